"""Search Q-Sched's factors for a model, and accept them only if held-out prompts agree."""

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
from diffalign.evaluation.score import Score, repeat_prompts
from diffalign.pipelines.base import TextToImageModel
from diffalign.schedulers import Coefficients, QSched
from diffalign.tuning.engines import ENGINES, Space
from diffalign.tuning.evaluator import Drawing, Evaluator
from diffalign.tuning.objective import Objective, ObjectiveError, Scores
from diffalign.tuning.start import closed_form


@dataclass(frozen=True)
class Settings:
    """Settings of a search; see `diffalign qsched --help`."""

    objective: Mapping[str, float]
    engine: str = "cma"
    budget: int = 200
    """Number of candidates; each is evaluated on every calibration image."""
    low: float = 0.8
    high: float = 1.2
    penalty: float = 0.0
    """Weight of the squared distance from 1, in standard deviations of the objective."""
    held_out: float = 0.5
    """Share of the prompts that decide whether the best candidate is accepted."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(
                f"engine={self.engine}: no such engine. Choose from {', '.join(ENGINES)}."
            )
        if self.budget < 1:
            raise UsageError(f"budget={self.budget} is too small. Set at least 1.")
        if not 0 < self.held_out < 1:
            raise UsageError(
                f"held_out={self.held_out} is not a share of the prompts. Set a number between 0 and 1."
            )
        if not 0 <= self.penalty < math.inf:
            raise UsageError(f"penalty={self.penalty} must be finite and not negative.")


@dataclass
class TuneResult:
    """Result of a search for factors.

    Attributes:
        best: best candidate on the calibration prompts.
        accepted: whether `interval` lies above 0.
        gain: mean of the objective over held-out images; 0 for the original schedule.
        interval: 95 % bootstrap interval of `gain` over prompts.
        coefficients: the best candidate if it is accepted, else ones.
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
    """Mean of each term on held-out images, for the original schedule and the best candidate."""
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @property
    def coefficients(self) -> Coefficients:
        return self.best if self.accepted else Coefficients.ones(len(self.best))

    def apply(self, pipeline: Any) -> None:
        """Set the factors in a pipeline's scheduler.

        The pipeline's next call with this number of steps uses them, if its weights are those of the search. Factors
        that were not accepted do not replace those of an earlier search.
        """
        pipeline.scheduler = QSched.wrap(pipeline.scheduler, fingerprint=of_denoiser(pipeline))
        if self.accepted or not pipeline.scheduler.has_coefficients(len(self.best)):
            pipeline.scheduler.set_coefficients(self.coefficients, fingerprint=self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON."""
        plain = asdict(self)
        for name in ("best", "start"):
            plain[name] = asdict(getattr(self, name))
        return plain | {"coefficients": asdict(self.coefficients)}

    def save(self, file: Path) -> None:
        """Write the result as JSON, atomically."""
        write_text(file, json.dumps(self.to_dict(), indent=2))


def split(prompts: Sequence[Prompt], held_out: float) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into those for calibration and those for acceptance.

    Both are spread over the list, and no text is in both.

    Args:
        prompts: the prompts; texts may repeat.
        held_out: share of the texts for acceptance. If texts repeat, shares of images can differ from it.

    Raises:
        UsageError: one of the lists would be empty.
    """
    texts = list(dict.fromkeys(p.text for p in prompts))
    count = round(len(texts) * held_out)
    if not 0 < count < len(texts):
        raise UsageError(
            f"prompts: {len(texts)} prompts cannot be split into calibration and held-out ones "
            f"(`held_out` is {held_out:g}). Give at least 2, better 50."
        )
    held_out_texts = {texts[i * len(texts) // count] for i in range(count)}
    return (
        [p for p in prompts if p.text not in held_out_texts],
        [p for p in prompts if p.text in held_out_texts],
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
        model: model, quantised or not. Its pipeline's scheduler is wrapped and has no factors during the search and
            until `TuneResult.apply`.
        prompts: prompts for the search and for its acceptance (`split`).
        score: function like `CompositeReward.score`; its details contain every term of the objective.
        settings: settings of the search.
        drawing: sampling settings.
        reference: model before quantisation. The search then starts from the closed form if that beats the original
            schedule on the calibration prompts. "grid" and "ramp" have no start; "none" tries the closed form only.
        file: file of all scores, from which the same call resumes.

    Raises:
        UsageError: the scheduler's step is not linear, or there are too few prompts.
        ObjectiveError: the scores leave nothing to maximise.
        LockError: another process writes scores to the file.
        Interrupted: a signal came; the scores so far are stored.
    """
    started = time.perf_counter()
    calibration, held_out = split(prompts, settings.held_out)
    with locks.hold(file.parent, setting="work") if file else nullcontext():
        result = search(
            model, calibration, score, settings, drawing, reference=reference, file=file
        )
        base, best = score_unseen(
            model, held_out, score, settings, drawing, [result.best], file=file
        )
    texts = [p.text for p in repeat_prompts(held_out, drawing)]
    gain, bounds = accept(settings.objective, base, best, texts)
    return TuneResult(
        best=result.best,
        accepted=not result.best.identity and bounds[0] > 0,
        gain=gain,
        interval=bounds,
        calibration_value=result.value,
        start=result.start,
        fingerprint=of_denoiser(model.pipeline),
        network_rows=result.network_rows,
        evaluations=len(result.history),
        seconds=time.perf_counter() - started,
        held_out={"identity": _means(base), "best": _means(best)},
        history=result.history,
    )


@dataclass(frozen=True)
class Search:
    """Result of a search without acceptance.

    Attributes:
        best: candidate with the highest `value` on the images of the search.
        value: its value.
        start: candidate from which the search started.
        network_rows: rows of the denoiser's forwards.
        history: all candidates in order, each with `coefficients`, `value` and the denoiser `rows` until then.
    """

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
    """Search on all `prompts`, without acceptance; see `tune`."""
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
    coefficients = Coefficients.from_vector(best["coefficients"])
    return Search(coefficients, best["value"], space.origin, evaluator.network_rows, history)


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
    """Score the original schedule and each candidate on noise that `search` has not used.

    The prompts should be new to the search, too.
    """
    with _bare_schedule(model):
        other = replace(drawing, seed=drawing.seed + 1)
        evaluator = _evaluator(model, prompts, score, settings, other, file)
        return evaluator([Coefficients.ones(drawing.num_inference_steps), *candidates])


@contextmanager
def _bare_schedule(model: TextToImageModel) -> Iterator[None]:
    """Wrap the pipeline's scheduler and remove its factors inside the context."""
    pipeline = model.pipeline
    pipeline.scheduler = QSched.wrap(pipeline.scheduler)
    tables = pipeline.scheduler.tables
    pipeline.scheduler.clear_coefficients()
    try:
        yield
    finally:
        pipeline.scheduler.tables = tables


def _evaluator(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    file: Path | None,
) -> Evaluator:
    """Return an evaluator whose scores depend on all weights and the scheduler's settings.

    The weights are those of the denoiser, the text encoders and the autoencoder.
    """
    pipeline = model.pipeline
    key = [of_pipeline(pipeline), str(model.denoiser.dtype), pipeline.scheduler.settings]
    return Evaluator(model, prompts, score, list(settings.objective), drawing, file=file, key=key)


@dataclass
class _Progress:
    """Progress bar of candidates, cached ones included, with the best value so far."""

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
    """Return the space that starts at the closed form if that beats the original schedule.

    The closed form is optimal for the latents of a step, which after coarse rounding can be far from optimal for
    images. Engines without a start skip its cost.
    """
    if settings.engine in ("grid", "ramp"):
        return space
    started = replace(space, start=closed_form(evaluator, reference))
    if settings.engine == "none" or objective(started.origin, evaluator([started.origin])[0]) > 0:
        return started
    return space


def _search(
    evaluator: Evaluator, objective: Objective, space: Space, settings: Settings
) -> list[dict[str, Any]]:
    """Return all candidates in order; the original schedule is the first."""
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
    weights: Mapping[str, float], base: Scores, scores: Scores, prompts: Sequence[str]
) -> tuple[float, tuple[float, float]]:
    """Return the mean gain over images and its 95 % interval over prompts.

    The scale is that of the original schedule's scores, `base`.

    Raises:
        ObjectiveError: fewer than half of the images have scores for both schedules, so that acceptance is
            undecidable.
    """
    gains = Objective(weights, base).per_image(scores)
    valid = np.isfinite(gains)
    if valid.sum() < max(1, len(gains) / 2):
        raise ObjectiveError(
            f"Only {valid.sum()} of {len(gains)} held-out images were scored with both schedules; at least half are "
            "needed. Check the rewards of the objective."
        )
    scored = [p for p, is_valid in zip(prompts, valid, strict=True) if is_valid]
    return float(gains[valid].mean()), bootstrap(gains[valid], scored)


def _means(scores: Scores) -> dict[str, float]:
    return {name: float(np.nanmean(values)) for name, values in scores.items()}
