"""Score a model on prompts: the same seeds before and after, so that the difference is the model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from diffalign.config import EvaluationConfig
from diffalign.core.seeds import EVALUATION, stream
from diffalign.data.prompts import Prompt
from diffalign.evaluation import intervals
from diffalign.evaluation.figures import CORRECT
from diffalign.evaluation.intervals import Difference, Estimate
from diffalign.geneval.rules import summarize
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import OnImages, Sampler
from diffalign.types import RewardOutput

Score = Callable[[Tensor, Sequence[str], Sequence[Any]], RewardOutput]
Progress = Callable[[int, int], None]
"""Callback of long work: images done, images in all."""


@dataclass(frozen=True)
class Evaluation:
    """Images of a model on prompts, and their scores.

    The accuracy of each task and their mean are `tasks`, where a reward says what is correct. `means` is the mean of
    the reward and of each detail over the images that have it, `scores` their values (N,) per image. `images` (N, 3,
    H, W) uint8 are in the order of `prompts`. `failed` counts the images without a reward, `not_finite` among them
    those whose latents are not numbers.
    """

    prompts: list[Prompt]
    images: Tensor
    rewards: np.ndarray
    means: dict[str, float]
    tasks: dict[str, float]
    failed: int
    not_finite: int = 0
    rows: tuple[int, ...] | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The prompt of each image."""
        return [p.text for p in self.prompts]

    def intervals(self) -> dict[str, dict[str, Estimate]]:
        """Return the interval of each of `means` and `tasks`."""
        return {
            "means": {
                name: estimate
                for name, values in self.scores.items()
                if (estimate := intervals.mean(values, self.texts)) is not None
            },
            "tasks": {}
            if (values := correct_column(self.scores)) is None
            else intervals.task_mean(values, self.texts, [p.task for p in self.prompts]),
        }

    def differences(self, before: Evaluation) -> dict[str, dict[str, Difference]]:
        """Return the paired difference to `before` of each mean and task that both have.

        The two evaluations have the same prompts and seeds, image by image.
        """
        if self.texts != before.texts:
            return {"means": {}, "tasks": {}}
        both = [name for name in self.scores if name in before.scores]
        means = {
            name: difference
            for name in both
            if (
                difference := intervals.difference(
                    self.scores[name], before.scores[name], self.texts
                )
            )
        }
        mine, other = correct_column(self.scores), correct_column(before.scores)
        tasks = {}
        if mine is not None and other is not None:
            kinds = [p.task for p in self.prompts]
            tasks = intervals.task_difference(mine, other, self.texts, kinds)
        return {"means": means, "tasks": tasks}

    def image(self, row: int) -> Tensor:
        """(3, H, W) uint8 of a row of `prompts`."""
        return self.images[row if self.rows is None else self.rows.index(row)]

    def thinned(self, rows: Sequence[int]) -> Evaluation:
        """Return a copy that has the images of some rows only."""
        return replace(self, images=self.images[list(rows)], rows=tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": len(self.prompts),
            "scored": len(self.prompts) - self.failed,
            "failed": self.failed,
            "not_finite": self.not_finite,
            "means": self.means,
            "tasks": self.tasks,
            "intervals": as_dicts(self.intervals()),
        }


def as_dicts(groups: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    """Return intervals of `means` and `tasks` for JSON."""
    return {
        group: {n: e.to_dict() for n, e in estimates.items()} for group, estimates in groups.items()
    }


def drawing_of(config: EvaluationConfig, **others: Any) -> Drawing:
    """Return the sampling settings of an evaluation.

    Args:
        others: further fields of `Drawing`, such as `size`.
    """
    own = {f.name for f in fields(Drawing)}
    return Drawing(**{k: v for k, v in vars(config).items() if k in own}, **others)


def evaluate_model(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    drawing: Drawing,
    *,
    on_images: OnImages | None = None,
) -> Evaluation:
    """Draw and score images of every prompt.

    There are `images_per_prompt` images for every prompt, or `images_per_task` for every task: one for each row of
    `repeat_prompts`.

    Args:
        on_images: called once for each batch, in the order of the rows, before the batch is scored.
    """
    repeated = repeat_prompts(prompts, drawing)
    parts: list[RewardOutput] = []

    def score_part(part: slice, images: Tensor) -> None:
        if on_images is not None:
            on_images(part, images)
        prompts_of_part = repeated[part]
        parts.append(
            score(images, [p.text for p in prompts_of_part], [p.metadata for p in prompts_of_part])
        )

    samples = Sampler(model, drawing).images(
        [p.text for p in repeated], image_seeds(drawing, len(repeated)), on_images=score_part
    )
    output = without(~samples.finite.numpy(), RewardOutput.cat(parts))
    evaluation = summarize_scores(repeated, samples.images, output)
    return replace(evaluation, not_finite=int((~samples.finite).sum()))


def without(broken: np.ndarray, output: RewardOutput) -> RewardOutput:
    """NaN for the images (B,) that are none, whatever a reward made of them."""
    columns = {k: np.where(broken, np.nan, v) for k, v in output.details.items()}
    return RewardOutput(np.where(broken, np.nan, output.values), columns)


def image_seeds(drawing: Drawing, n: int) -> list[int]:
    """Return the seeds of n images."""
    return [stream(EVALUATION, drawing.seed, i) for i in range(n)]


def repeat_prompts(prompts: Sequence[Prompt], drawing: Drawing | EvaluationConfig) -> list[Prompt]:
    """Return the prompt of every image that is to be made."""
    if drawing.images_per_task is None:
        return [p for p in prompts for _ in range(drawing.images_per_prompt)]
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    return [
        pool[i % len(pool)] for pool in by_task.values() for i in range(drawing.images_per_task)
    ]


def correct_column(scores: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the column of scores that says which images are correct, or None."""
    return next((values for name, values in scores.items() if name.endswith(CORRECT)), None)


def summarize_scores(prompts: list[Prompt], images: Tensor, output: RewardOutput) -> Evaluation:
    """Means over images with a reward; GenEval's table where some reward reports `correct`."""
    mask = output.mask
    columns = {"reward": output.values, **output.details}
    scores = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    means = {k: float(np.nanmean(v)) for k, v in columns.items() if np.isfinite(v).any()}
    correct = correct_column(scores)
    tasks = {}
    if correct is not None:
        scored = [(p.task, c) for p, c in zip(prompts, correct, strict=True) if np.isfinite(c)]
        tasks = summarize([t for t, _ in scored], [c for _, c in scored])
    failed = int((~mask).sum())
    return Evaluation(prompts, images, output.values, means, tasks, failed, scores=scores)
