"""Search for a plan on one machine: measure, combine, accept on held-out prompts, and write what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.acceleration.choices import IDENTICAL
from diffalign.acceleration.drawing import Call
from diffalign.acceleration.report import Plan
from diffalign.acceleration.state import weights_of
from diffalign.core import locks
from diffalign.core.errors import UsageError
from diffalign.core.interruption import Interruption
from diffalign.core.seeds import EVALUATION, stream
from diffalign.data.prompts import Prompt, spread
from diffalign.evaluation.score import Score, repeat_prompts
from diffalign.optimisation.acceptance import Verdict, check_power, compare
from diffalign.optimisation.candidates import AXES, Candidate, levels_of
from diffalign.optimisation.choice import choose, nearest
from diffalign.optimisation.kept import Clock, Kept
from diffalign.optimisation.limits import PSNR, Limits
from diffalign.optimisation.measuring import CALIBRATION, Broken, Meter, Part, base_key, folder_of
from diffalign.optimisation.memory import machine, tells_memory
from diffalign.optimisation.search import Point, front, search
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.tuning.tune import split

SEARCH_SHARE = 0.5
"""Share of the time in which the search measures.

The rest is for the held-out prompts.
"""
LOOKS = 4
"""Number of parts of the held-out images; after each a hopeless point is left."""
CERTAIN = 0.999
"""Confidence with which a point is left before all of its images are drawn."""
LARGEST = 1 << 31
"""Bound of the seeds of images."""


@dataclass(frozen=True)
class Settings:
    """Settings of a search; see `diffalign optimise --help`."""

    limits: Limits
    axes: tuple[str, ...] = AXES
    minutes: float | None = 10.0
    held_out: float = 0.5
    images: int = 24
    """Number of images of the search."""
    images_per_call: int = 1
    """Number of images of the call whose seconds are the latency."""


@dataclass(frozen=True)
class Optimised:
    """Result of a search.

    Attributes:
        points: measured points, the plain pipeline first.
        tested: points that were tested on held-out prompts, in order.
        choice: point that keeps all limits, or None.
        nearest: point that is nearest to the limits.
        plan: plan of the choice, or None.
        call: call whose seconds are the latency.
        seconds: seconds of all measurements, those of earlier sittings included.
        images: number of images of the search and of the held-out prompts.
        machine: device, processor and threads.
    """

    limits: Limits
    points: list[Point]
    tested: list[Point]
    choice: Point | None
    nearest: Point
    plan: Plan | None
    call: Call
    seconds: float
    images: Mapping[str, int]
    machine: Mapping[str, Any]

    @property
    def plain(self) -> Point:
        """The plain pipeline."""
        return self.points[0]

    @property
    def front(self) -> list[Point]:
        """Points that no other beats, the fastest first, with their tests."""
        tested = {p.candidate: p for p in self.tested}
        best = front(self.points, memory=self.limits.memory is not None)
        return [tested.get(p.candidate, p) for p in best]

    def name(self, point: Point) -> str:
        """Return a point in words."""
        return point.candidate.text(self.call.steps)


def optimise(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    folder: Path,
    *,
    clock: Clock = time.perf_counter,
    say: Callable[[str], object] = lambda text: None,
) -> Optimised:
    """Search for the options that keep the limits of latency, memory and quality.

    The result depends on the measurements, the prompts and the seed only. Measurements are kept in the folder, so that
    the same call goes on after an interruption.

    Args:
        model: model whose pipeline is measured; it is plain again at the end.
        prompts: prompts of the search and of its acceptance (`tuning.tune.split`).
        score: function like `CompositeReward.score`, for the rewards that have limits.
        drawing: steps, guidance, size, seed and batch of the plain pipeline's images.
        folder: folder of the measurements.
        clock: function that returns seconds.
        say: receives a line for each measured point.

    Raises:
        UsageError: the prompts are too few to show that a limit is kept, or the machine does not tell what the budget
            limits.
        LockError: another process uses the folder.
        Interrupted: a signal came; the measurements so far are kept.
    """
    limits = settings.limits
    if limits.memory is not None and not tells_memory(model.device):
        raise UsageError(
            "this system does not tell the peak memory of a process. Leave memory out of the `budget`.",
            setting="budget",
        )
    parts = parts_of(prompts, settings, drawing)
    call = call_of(model, drawing, parts[0].prompts, images=settings.images_per_call)
    with (
        locks.hold(folder),
        Interruption("the current measurement is finished and kept") as interruption,
    ):
        key = base_key(model.pipeline, call, weights_of(model.pipeline))
        store = Kept(folder_of(folder), key=key, clock=clock, interruption=interruption)
        meter = Meter(
            model.pipeline,
            call,
            calibration=[p.text for p in spread(parts[0].prompts, CALIBRATION)],
            score=score,
            rewards=list(limits.differences),
            rows=drawing.micro_batch_size,
            store=store,
            clock=clock,
        )
        return _Run(meter, settings, parts, say).result()


def parts_of(prompts: Sequence[Prompt], settings: Settings, drawing: Drawing) -> tuple[Part, Part]:
    """Return the images of the search and those of its acceptance.

    Raises:
        UsageError: the prompts are too few to be split, or to show that a limit is kept.
    """
    own, other = (repeat_prompts(part, drawing) for part in split(prompts, settings.held_out))
    check_power(settings.limits, other)
    seeds = [stream(EVALUATION, drawing.seed, i) % LARGEST for i in range(2)]
    searched = spread(own, settings.images)
    # tasks stand one after the other, and a part of the images should be like all of them
    order = np.random.default_rng(seeds[1]).permutation(len(other))
    mixed = [other[int(i)] for i in order]
    return Part("search", searched, seeds[0]), Part("held-out", mixed, seeds[1])


def call_of(
    model: TextToImageModel, drawing: Drawing, prompts: Sequence[Prompt], *, images: int
) -> Call:
    """Return the stock pipeline's call that draws like these settings."""
    import inspect

    parameters = inspect.signature(type(model.pipeline).__call__).parameters
    arguments: dict[str, Any] = {}
    if drawing.guidance_scale is not None:
        arguments["guidance_scale"] = drawing.guidance_scale
    elif not model.guidance_is_embedded:
        arguments["guidance_scale"] = 1.0
    if "max_sequence_length" in parameters:
        arguments["max_sequence_length"] = model.max_sequence_length
    height, width = model.image_size(drawing.size)
    texts = tuple(prompts[i % len(prompts)].text for i in range(images))
    return Call(drawing.num_inference_steps, height, width, texts, arguments, drawing.seed)


class _Run:
    """One search with its measurements."""

    def __init__(
        self,
        meter: Meter,
        settings: Settings,
        parts: tuple[Part, Part],
        say: Callable[[str], object],
    ) -> None:
        self.meter, self.settings, self.say = meter, settings, say
        self.parts = parts
        self.steps = meter.call.steps
        self.plain_seconds = 0.0

    def result(self) -> Optimised:
        """Search, test on held-out prompts, and return what was found."""
        limits, memory = self.settings.limits, self.settings.limits.memory is not None
        plain = self.plain()
        levels = levels_of(self.meter.pipeline.device.type, memory=memory, axes=self.settings.axes)
        points = search(
            plain, levels, self.measure, ends=lambda: self.ends(SEARCH_SHARE), counts_memory=memory
        )
        best, tested = choose(points, limits, self.test, ends=lambda: self.ends(1.0))
        return Optimised(
            limits,
            points,
            tested,
            best,
            nearest(points, tested, limits),
            None if best is None else self.plan(best),
            self.meter.call,
            self.meter.store.seconds,
            {part.name: len(part.prompts) for part in self.parts},
            machine(self.meter.pipeline.device),
        )

    def ends(self, share: float) -> bool:
        """Return whether the measurements have used a share of the time."""
        minutes = self.settings.minutes
        return minutes is not None and self.meter.store.seconds >= 60 * minutes * share

    def plain(self) -> Point:
        """Return the point of the plain pipeline."""
        timing = self.meter.timing(Candidate(self.steps))
        # both halves of each pair are the plain pipeline
        self.plain_seconds = float(np.median([*timing.plain, *timing.own]))
        point = Point(Candidate(self.steps), 1.0, self.plain_seconds, timing.memory, IDENTICAL)
        self.say(f"plain: {self.plain_seconds:.3g} s")
        return point

    def measure(self, candidate: Candidate) -> Point:
        """Return the point of a candidate on the images of the search."""
        name = candidate.text(self.steps)
        point = Point(candidate, problem=self.meter.why_not(candidate))
        if point.problem is None:
            try:
                point = self._measured(candidate)
            except Broken as error:
                point = Point(candidate, problem=str(error))
        if point.problem is not None:
            self.say(f"{name}: left out, {point.problem}")
        else:
            self.say(f"{name}: {point.ratio:.2f} times as fast, {point.psnr:.1f} dB")
        return point

    def _measured(self, candidate: Candidate) -> Point:
        part = self.parts[0]
        timing = self.meter.timing(candidate)
        own, plain = self.meter.columns(candidate, part)
        return Point(
            candidate,
            timing.ratio,
            self.plain_seconds / timing.ratio,
            timing.memory,
            float(np.mean(own[PSNR])),
            compare(self.settings.limits, own, plain, part.prompts),
        )

    def test(self, point: Point) -> Point:
        """Return a point with its comparisons on held-out prompts."""
        part, limits = self.parts[1], self.settings.limits

        looks = [len(part.prompts) * i // LOOKS for i in range(1, LOOKS)]

        def hopeless(own: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray]) -> bool:
            if not looks or len(own[PSNR]) < looks[0]:
                return False
            while looks and len(own[PSNR]) >= looks[0]:
                looks.pop(0)
            verdicts = compare(limits, own, plain, part.prompts, confidence=CERTAIN)
            return any(v.refuted for v in verdicts.values())

        try:
            own, plain = self.meter.columns(point.candidate, part, enough=hopeless)
        except Broken as error:
            return replace(point, problem=str(error))
        verdicts = compare(limits, own, plain, part.prompts)
        tested = replace(point, held_out=verdicts)
        word = "accepted" if tested.accepted else "not accepted"
        self.say(f"{point.candidate.text(self.steps)} on held-out prompts: {word}{_told(verdicts)}")
        return tested

    def plan(self, point: Point) -> Plan:
        """Return the plan of a point, with its figures."""
        plan = self.meter.plan(point.candidate)
        figures = {
            "plain_seconds": self.plain_seconds,
            "seconds": point.latency,
            "ratio": point.ratio,
            "psnr": point.psnr,
            "images": float(len(self.parts[0].prompts)),
        }
        return replace(plan, measured=figures)


def _told(verdicts: Mapping[str, Verdict]) -> str:
    """Return the comparisons in words."""
    parts = [
        f"{name} {v.estimate.value:.4g} ({v.estimate.low:.4g} to {v.estimate.high:.4g})"
        for name, v in verdicts.items()
    ]
    return f": {', '.join(parts)}" if parts else ""
