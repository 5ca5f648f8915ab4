"""Measurements of one candidate: its time beside the plain pipeline's, its memory, and its images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.acceleration.apply import accelerated
from diffalign.acceleration.calibration import Calibration
from diffalign.acceleration.checking import faults_of
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.guidance import Guidance
from diffalign.acceleration.order import fingerprint_of
from diffalign.acceleration.report import Plan
from diffalign.acceleration.request import scheduler_settings
from diffalign.acceleration.rules import settle
from diffalign.acceleration.schedule import Schedule
from diffalign.acceleration.situation import situation_of
from diffalign.core.errors import UserError, first_line
from diffalign.core.fingerprint import of_json
from diffalign.core.versions import versions
from diffalign.data.prompts import Prompt, told
from diffalign.evaluation.kept import keep, kept
from diffalign.evaluation.score import Evaluation, Score, summarize_scores
from diffalign.optimisation.candidates import SLOW_TO_APPLY, Candidate
from diffalign.optimisation.kept import Clock, Kept
from diffalign.optimisation.limits import PSNR
from diffalign.optimisation.memory import machine, peak_bytes

CALIBRATION = 4
"""Number of images of the cache's calibration."""
ROUNDS = 5
"""Number of pairs of calls that are timed."""
Columns = dict[str, np.ndarray]
"""Values (N,) of N images by name."""


class Broken(UserError):
    """Candidate that cannot be applied, or whose images are damaged."""


@dataclass(frozen=True)
class Part:
    """Prompt of each image, and the seed of the first image."""

    name: str
    prompts: list[Prompt]
    seed: int

    def chunks(self, rows: int) -> list[tuple[list[Prompt], int]]:
        """Return the prompts of each batch with the seed of its first image."""
        starts = range(0, len(self.prompts), rows)
        return [(self.prompts[start : start + rows], self.seed + start) for start in starts]


@dataclass(frozen=True)
class Timing:
    """Time and memory of one call.

    Attributes:
        ratio: median over pairs of the plain pipeline's seconds to the candidate's.
        plain: seconds of the plain pipeline's calls.
        own: seconds of the candidate's calls.
        memory: peak bytes of a call; None where the system does not tell.
    """

    ratio: float
    plain: Sequence[float]
    own: Sequence[float]
    memory: int | None


class Meter:
    """Instrument that applies candidates to one pipeline and measures them.

    Args:
        pipeline: pipeline without an acceleration.
        call: size, steps and arguments of the calls; its prompts are those of a timed call.
        calibration: prompts of the cache's calibration.
        score: rewards of images; its details are kept by name.
        rewards: names of the rewards.
        rows: images that are drawn at a time.
        store: kept measurements.
        clock: function that returns seconds.
    """

    def __init__(
        self,
        pipeline: Any,
        call: Call,
        *,
        calibration: Sequence[str],
        score: Score,
        rewards: Sequence[str],
        rows: int,
        store: Kept,
        clock: Clock,
    ) -> None:
        self.pipeline, self.call, self.rows, self.store = pipeline, call, rows, store
        self._calibration, self._score, self._clock = calibration, score, clock
        self._rewards = sorted(rewards)
        self._fingerprint = fingerprint_of(pipeline)
        self._situation = lru_cache(maxsize=None)(self._look)
        self._is_warm = False

    def why_not(self, candidate: Candidate) -> str | None:
        """Return the reason and the remedy of the rule that excludes a candidate, or None."""
        values = {name: (value, False) for name, value in candidate.named().items()}
        situation = self._situation(candidate.steps, "guidance" in candidate.axes)
        dropped = settle(values, situation)[1]
        return f"{dropped[0].why}; {dropped[0].remedy}" if dropped else None

    def plan(self, candidate: Candidate) -> Plan:
        """Return the plan that puts a candidate in force, after its cache is calibrated."""
        schedule = self._schedule(candidate) if candidate.computed is not None else None
        return self._plan(candidate, schedule)

    def timing(self, candidate: Candidate) -> Timing:
        """Return the time of a candidate beside the plain pipeline's, and its memory.

        Raises:
            Broken: the candidate cannot be applied.
        """
        record = self._get({"timing": candidate.key}, lambda: self._timed(candidate))
        return Timing(**record)

    def columns(
        self,
        candidate: Candidate,
        part: Part,
        *,
        enough: Callable[[Columns, Columns], bool] | None = None,
    ) -> tuple[Columns, Columns]:
        """Return the values of a candidate's images and of the plain ones.

        They are rewards; the candidate's include the PSNR to the plain images.

        Args:
            enough: is asked after each batch with the values so far; True ends.

        Raises:
            Broken: the candidate cannot be applied, or its images are damaged.
        """
        own: list[Columns] = []
        plain: list[Columns] = []
        for number, (prompts, seed) in enumerate(part.chunks(self.rows)):
            place = Part(f"{part.name}-{number}", prompts, seed)
            base = self._plain(place)
            key = {"images": candidate.key, "part": place.name, "of": self._told(place)}
            record = self._get(key, lambda p=place: self._drawn(candidate, p))  # type: ignore[misc]
            own.append({n: np.array(v, np.float64) for n, v in record.items()})
            plain.append(base.scores)
            if enough is not None and enough(_joined(own), _joined(plain)):
                break
        return _joined(own), _joined(plain)

    @contextmanager
    def in_force(self, candidate: Candidate) -> Iterator[None]:
        """Put a candidate in force inside of the block."""
        if candidate == Candidate(self.call.steps):
            yield
            return
        with accelerated(self.pipeline, self.plan(candidate)):
            yield

    def _get(self, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a kept measurement; a failure is kept, too."""

        def attempt() -> dict[str, Any]:
            try:
                return make()
            # options of diffusers and torch fail in any way on pipelines that they do not know
            except Exception as error:
                return {"problem": first_line(error)}

        record = self.store.get(key, attempt)
        if "problem" in record:
            raise Broken(record["problem"])
        return record

    def _look(self, steps: int, guidance: bool) -> Any:
        call = replace(self.call, steps=steps)
        return situation_of(self.pipeline, call, {"guidance": ""} if guidance else {})

    def _told(self, part: Part) -> list[Any]:
        return [told(part.prompts), part.seed, self._rewards]

    def _plan(self, candidate: Candidate, schedule: Schedule | None) -> Plan:
        options = candidate.named()
        if schedule is not None:
            options["cache"] = round(schedule.measured["median_psnr"], 1)
        return Plan(
            type(self.pipeline).__name__,
            (self._fingerprint,),
            type(self.pipeline.scheduler).__name__,
            options,
            candidate.steps,
            ((self.call.height, self.call.width),),
            () if schedule is None else (schedule,),
            (len(self.call.prompts),),
            scheduler_settings(self.pipeline.scheduler),
            versions=versions(),
            device=self.pipeline.device.type,
        )

    def _schedule(self, candidate: Candidate) -> Schedule:
        """Return the schedule of a candidate's cache, calibrated with its other options in force."""
        record = self._get({"schedule": candidate.key}, lambda: self._calibrated(candidate))
        return Schedule.from_json(record)

    def _calibrated(self, candidate: Candidate) -> dict[str, Any]:
        prompts = tuple(self._calibration[:CALIBRATION])
        call = replace(self.call, steps=candidate.steps, prompts=prompts)
        kind = dict(candidate.options).get("guidance")
        # the cache lies outside of guidance, and both share one interception
        inside = () if kind is None else (Guidance(self.pipeline, kind, steps=candidate.steps),)
        others = tuple(pair for pair in candidate.options if pair[0] != "guidance")
        assert candidate.computed is not None
        with self.in_force(Candidate(self.call.steps, others)):
            schedule = Calibration(self.pipeline, call, inside).best(candidate.computed)
        return schedule.to_json()

    def _timed(self, candidate: Candidate) -> dict[str, Any]:
        if not self._is_warm:
            # the first call of a process pays for much that has nothing to do with the pipeline
            self._seconds(self.call)
            self._is_warm = True
        call = replace(self.call, steps=candidate.steps)
        plain: list[float] = []
        own: list[float] = []
        with self.in_force(candidate):
            memory = peak_bytes(lambda: draw(self.pipeline, call), self.pipeline.device)
        if candidate.axes & set(SLOW_TO_APPLY):
            half = ROUNDS // 2
            plain += [self._seconds(self.call) for _ in range(half)]
            with self.in_force(candidate):
                draw(self.pipeline, call)
                own += [self._seconds(call) for _ in range(ROUNDS)]
            plain += [self._seconds(self.call) for _ in range(ROUNDS - half)]
        else:
            for turn in range(ROUNDS):
                # the first of a pair changes, so that a slowing machine favours neither
                for is_plain in (True, False) if turn % 2 else (False, True):
                    if is_plain:
                        plain.append(self._seconds(self.call))
                        continue
                    with self.in_force(candidate):
                        own.append(self._seconds(call))
        ratio = statistics.median(p / o for p, o in zip(plain, own, strict=True))
        return asdict(Timing(ratio, plain, own, memory))

    def _seconds(self, call: Call) -> float:
        started = self._clock()
        draw(self.pipeline, call)
        return self._clock() - started

    def _draw(self, part: Part, *, steps: int) -> Tensor:
        """Return images (B, 3, H, W) uint8."""
        texts = tuple(p.text for p in part.prompts)
        images = draw(self.pipeline, replace(self.call, steps=steps, prompts=texts, seed=part.seed))
        if faults := faults_of(images):
            raise Broken(faults[0])
        return (images.clamp(0, 1) * 255).round().to(torch.uint8)

    def _scored(self, images: Tensor, part: Part) -> Evaluation:
        output = self._score(
            images, [p.text for p in part.prompts], [p.metadata for p in part.prompts]
        )
        return summarize_scores(part.prompts, images, output)

    def _plain(self, part: Part) -> Evaluation:
        """Return the plain images of a part, drawn once."""
        key = {"plain": part.name, "of": self._told(part)}
        file = self.store.file(key, ".safetensors")
        evaluation = kept(file, part.prompts, key=key)
        if evaluation is not None:
            # it counts, although nothing is drawn
            self.store.get(key, dict)
            return evaluation

        def make() -> dict[str, Any]:
            scored = self._scored(self._draw(part, steps=self.call.steps), part)
            file.parent.mkdir(parents=True, exist_ok=True)
            keep(scored, file, key=key)
            return {}

        self.store.again(key, make)
        evaluation = kept(file, part.prompts, key=key)
        assert evaluation is not None
        return evaluation

    def _drawn(self, candidate: Candidate, part: Part) -> dict[str, Any]:
        """Return the PSNR and the rewards of a candidate's images."""
        with self.in_force(candidate):
            images = self._draw(part, steps=candidate.steps)
        # the plain images are read only now, for they may be large
        values = psnr(images.float() / 255, self._plain(part).images.float() / 255)
        scores = self._scored(images, part).scores
        return {PSNR: values, **{n: [float(x) for x in v] for n, v in scores.items()}}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def base_key(pipeline: Any, call: Call, weights: Any) -> dict[str, Any]:
    """Return all that the measurements depend on, besides candidate and prompts, as a JSON value."""
    device = pipeline.device
    return {
        "weights": of_json(weights),
        "dtype": str(pipeline.dtype),
        "scheduler": [
            type(pipeline.scheduler).__name__,
            of_json(dict(pipeline.scheduler.config), default=str),
        ],
        "call": {**asdict(call), "arguments": dict(call.arguments)},
        "machine": machine(device),
        "versions": {n: v for n, v in versions().items() if n != "commit"},
    }


def folder_of(output_dir: Path) -> Path:
    """Return the folder of the measurements."""
    return output_dir / "measurements"
