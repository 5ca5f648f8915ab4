"""Find Q-Sched's factors for a model, and keep them only if held-out prompts agree."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.core import console, locks
from diffalign.core.errors import UsageError
from diffalign.core.files import write_text
from diffalign.core.fingerprint import of_denoiser, of_pipeline
from diffalign.data.prompts import Prompt
from diffalign.evaluation.intervals import bootstrap
from diffalign.evaluation.score import Score
from diffalign.pipelines.base import TextToImageModel
from diffalign.schedulers import Coefficients, QSched
from diffalign.tuning.engines import ENGINES, Space
from diffalign.tuning.evaluator import Drawing, Evaluator
from diffalign.tuning.objective import Objective, ObjectiveError, Scores
from diffalign.tuning.start import closed_form


@dataclass(frozen=True)
class Settings:
    """Of a search; see `diffalign qsched --help`."""

    objective: Mapping[str, float]
    engine: str = "cma"
    budget: int = 200
    """Candidates, each drawn for every calibration image."""
    low: float = 0.8
    high: float = 1.2
    penalty: float = 0.0
    """Of the squared distance from 1, in standard deviations of the objective."""
    held_out: float = 0.5
    """Share of the prompts that decide whether the best is accepted."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(
                f"engine: unknown engine {self.engine!r}; known are {', '.join(ENGINES)}"
            )
        if self.budget < 1:
            raise UsageError(f"budget must be at least 1, got {self.budget}")
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out must lie in 0..1, got {self.held_out}")
        if not 0 <= self.penalty < math.inf:
            raise UsageError(f"penalty must be at least 0, got {self.penalty}")


@dataclass
class TuneResult:
    """What a search found.

    `gain` is the mean of the objective over held-out images (identity: 0), `interval` its 95 % bootstrap interval over
    prompts; `coefficients` are the best candidate's if the interval lies above 0, otherwise ones.
    """

    best: Coefficients
    accepted: bool
    gain: float
    interval: tuple[float, float]
    calibration_value: float
    start: Coefficients
    fingerprint: str
    network_rows: int
    evaluations: int
    seconds: float
    held_out: dict[str, dict[str, float]]
    """Means of each term on held-out images, for the schedule as it is and for the best candidate."""
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @property
    def coefficients(self) -> Coefficients:
        return self.best if self.accepted else Coefficients.ones(len(self.best))

    def apply(self, pipeline: Any) -> None:
        """Put the factors into a pipeline's scheduler; its next call with so many steps uses them, if its weights are
        those that they were found with. What was not accepted does not replace what an earlier search left there."""
        pipeline.scheduler = QSched.wrap(pipeline.scheduler, fingerprint=of_denoiser(pipeline))
        if self.accepted or not pipeline.scheduler.has_coefficients(len(self.best)):
            pipeline.scheduler.set_coefficients(self.coefficients, fingerprint=self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        found = asdict(self)
        for name in ("best", "start"):
            found[name] = asdict(getattr(self, name))
        return found | {"coefficients": asdict(self.coefficients)}

    def save(self, file: Path) -> None:
        """As JSON, whole or not at all."""
        write_text(file, json.dumps(self.to_dict(), indent=2))


def split(prompts: Sequence[Prompt], held_out: float) -> tuple[list[Prompt], list[Prompt]]:
    """For calibration and for acceptance, both spread over the list; no text is in both.

    Args:
        held_out: share of the texts that accept. Of a list that repeats some, the shares of images can differ from it.

    Raises:
        UsageError: one of them would be empty.
    """
    texts = list(dict.fromkeys(p.text for p in prompts))
    count = round(len(texts) * held_out)
    if not 0 < count < len(texts):
        raise UsageError(
            f"prompts: {len(texts)} prompts cannot be split into calibration and held-out ones (`held_out` "
            f"{held_out:g}); give at least 2, better 50"
        )
    chosen = {texts[i * len(texts) // count] for i in range(count)}
    return (
        [p for p in prompts if p.text not in chosen],
        [p for p in prompts if p.text in chosen],
    )


def tune(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    *,
    reference: TextToImageModel | None = None,
    file: Path | None = None,
) -> TuneResult:
    """Search factors for `drawing.num_inference_steps` steps of the model's own scheduler.

    Args:
        model: quantised or not; its pipeline's scheduler is wrapped, and runs without factors meanwhile and afterwards
            until `TuneResult.apply`.
        prompts: some to search with, others to accept with (`split`).
        score: as `CompositeReward.score`, with every term of the objective among its details.
        reference: the model before it was quantised: the search then starts from the closed form, if that is better on
            the calibration prompts than the schedule as it is. ("grid" and "ramp" start nowhere, "none" is that alone.)
        file: keeps all scores; the same call goes on from there.

    Raises:
        UsageError: the scheduler's step is not linear, or there are too few prompts.
        ObjectiveError: scores that leave nothing to maximise.
        LockError: another process adds scores to the file.
        Interrupted: a signal came; the scores so far are kept.
    """
    started = time.perf_counter()
    calibration, held_out = split(prompts, settings.held_out)
    with locks.hold(file.parent, setting="work") if file else nullcontext():
        found = search(model, calibration, score, settings, drawing, reference=reference, file=file)
        base, best = score_unseen(
            model, held_out, score, settings, drawing, [found.best], file=file
        )
    asked = [p.text for p in held_out for _ in range(drawing.images_per_prompt)]
    gain, bounds = accept(settings.objective, base, best, asked)
    return TuneResult(
        best=found.best,
        accepted=not found.best.identity and bounds[0] > 0,
        gain=gain,
        interval=bounds,
        calibration_value=found.value,
        start=found.start,
        fingerprint=of_denoiser(model.pipeline),
        network_rows=found.network_rows,
        evaluations=len(found.history),
        seconds=time.perf_counter() - started,
        held_out={"identity": _means(base), "best": _means(best)},
        history=found.history,
    )


@dataclass(frozen=True)
class Search:
    """The best candidate by its `value` on the images that a search saw, and how it was found: where it started, all
    candidates in the order they were tried (`coefficients`, `value`, and the network's `rows` until then)."""

    best: Coefficients
    value: float
    start: Coefficients
    network_rows: int
    history: list[dict[str, Any]]


def search(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    *,
    reference: TextToImageModel | None = None,
    file: Path | None = None,
) -> Search:
    """`tune` without its acceptance: all `prompts` are searched with."""
    with _bare_schedule(model):
        evaluator = _evaluator(model, prompts, score, settings, drawing, file)
        ones = Coefficients.ones(drawing.num_inference_steps)
        space = Space(len(ones), settings.low, settings.high, ones)
        objective = Objective(settings.objective, evaluator([ones])[0], settings.penalty)
        if reference is not None:
            space = _start(evaluator, objective, space, settings, reference)
        with console.progress("qsched", settings.budget, unit="candidate") as bar:
            evaluator.on_scores = _Progress(bar, objective)
            history = _search(evaluator, objective, space, settings)
    best = max(history, key=lambda row: row["value"])
    chosen = Coefficients.from_vector(best["coefficients"])
    return Search(chosen, best["value"], space.origin, evaluator.network_rows, history)


def score_unseen(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    candidates: Sequence[Coefficients],
    *,
    file: Path | None = None,
) -> list[Scores]:
    """Of the schedule as it is and of each candidate, all with noise that `search` has not drawn with that `drawing`;
    the prompts should be new to it, too."""
    with _bare_schedule(model):
        other = replace(drawing, seed=drawing.seed + 1)
        evaluator = _evaluator(model, prompts, score, settings, other, file)
        return evaluator([Coefficients.ones(drawing.num_inference_steps), *candidates])


@contextmanager
def _bare_schedule(model: TextToImageModel) -> Iterator[None]:
    """The pipeline's scheduler is wrapped; factors that it had come back at the end."""
    pipeline = model.pipeline
    pipeline.scheduler = QSched.wrap(pipeline.scheduler)
    known = pipeline.scheduler.tables
    pipeline.scheduler.clear_coefficients()
    try:
        yield
    finally:
        pipeline.scheduler.tables = known


def _evaluator(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    file: Path | None,
) -> Evaluator:
    """Scores belong to weights, of text encoders and of the autoencoder as well, and to a scheduler's settings."""
    pipeline = model.pipeline
    key = [of_pipeline(pipeline), str(model.denoiser.dtype), pipeline.scheduler.settings]
    return Evaluator(model, prompts, score, list(settings.objective), drawing, file=file, key=key)


@dataclass
class _Progress:
    """Counts candidates, those that were scored before, too, and shows the best value so far."""

    bar: Any
    objective: Objective
    best: float = 0.0

    def __call__(self, candidate: Coefficients, scores: Scores) -> None:
        self.best = max(self.best, self.objective(candidate, scores))
        self.bar.set_postfix(best=f"{self.best:+.3f}", refresh=False)
        self.bar.update(1)


def _start(
    evaluator: Evaluator,
    objective: Objective,
    space: Space,
    settings: Settings,
    reference: TextToImageModel,
) -> Space:
    """With the closed form as its start, where that beats the schedule as it is: it is the best for the latents of a
    step, which coarse rounding can draw far from the best for images. An engine that starts nowhere pays nothing."""
    if settings.engine in ("grid", "ramp"):
        return space
    found = replace(space, start=closed_form(evaluator, reference))
    if settings.engine == "none" or objective(found.origin, evaluator([found.origin])[0]) > 0:
        return found
    return space


def _search(
    evaluator: Evaluator, objective: Objective, space: Space, settings: Settings
) -> list[dict[str, Any]]:
    """All candidates in the order they were tried, the schedule as it is first."""
    ones = Coefficients.ones(space.steps)
    history = [{"coefficients": ones.vector, "value": 0.0, "rows": evaluator.network_rows}]
    engine = ENGINES[settings.engine](space, budget=settings.budget, seed=settings.seed)
    values: list[float] | None = None
    while True:
        try:
            candidates = next(engine) if values is None else engine.send(values)
        except StopIteration:
            return history
        values = []
        for candidate, scores in zip(candidates, evaluator(candidates), strict=True):
            values.append(objective(candidate, scores))
            history.append(
                {
                    "coefficients": candidate.vector,
                    "value": values[-1],
                    "rows": evaluator.network_rows,
                }
            )


def accept(
    weights: Mapping[str, float], base: Scores, found: Scores, prompts: Sequence[str]
) -> tuple[float, tuple[float, float]]:
    """Mean gain over images and its 95 % interval over prompts, on the scale of the schedule as it is.

    Raises:
        ObjectiveError: fewer than half of the images could be scored with both: what is left says nothing of the rest.
    """
    gains = Objective(weights, base).per_image(found)
    valid = np.isfinite(gains)
    if valid.sum() < max(1, len(gains) / 2):
        raise ObjectiveError(
            f"{valid.sum()} of {len(gains)} held-out images could be scored with both schedules: too few to accept or "
            "to refuse by"
        )
    asked = [p for p, kept in zip(prompts, valid, strict=True) if kept]
    return float(gains[valid].mean()), bootstrap(gains[valid], asked)


def _means(scores: Scores) -> dict[str, float]:
    return {name: float(np.nanmean(values)) for name, values in scores.items()}
