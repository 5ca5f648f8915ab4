"""Score a model on prompts: the same seeds before and after, so that the difference is the model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.config import EvaluationConfig
from diffalign.core.seeds import EVALUATION, stream
from diffalign.data.prompts import Prompt
from diffalign.geneval.rules import summarize
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.recording import Recorder
from diffalign.pipelines.sampling import EmbedCache, generate
from diffalign.pipelines.solvers import solver_step
from diffalign.types import RewardOutput

Score = Callable[[Tensor, Sequence[str], Sequence[Any]], RewardOutput]
OnImages = Callable[[slice, Tensor], None]
"""Callback of one batch: its rows among all images, and the images (B, 3, H, W) uint8 on the CPU."""
Progress = Callable[[int, int], None]
"""Callback of long work: images done, images in all."""


@dataclass(frozen=True)
class Evaluation:
    """`tasks`: accuracy of each task and their mean where a reward says what is correct; `means`: mean of the reward
    and of each detail over the images that have it; `images` (N, 3, H, W) uint8 in the order of `prompts`. `failed`
    counts the images without a reward, `not_finite` among them those whose latents are not numbers."""

    prompts: list[Prompt]
    images: Tensor
    rewards: np.ndarray
    means: dict[str, float]
    tasks: dict[str, float]
    failed: int
    not_finite: int = 0
    rows: tuple[int, ...] | None = None

    def image(self, row: int) -> Tensor:
        """(3, H, W) uint8 of a row of `prompts`."""
        return self.images[row if self.rows is None else self.rows.index(row)]

    def thinned(self, rows: Sequence[int]) -> Evaluation:
        """The same with the images of some rows alone, for one that is kept."""
        return replace(self, images=self.images[list(rows)], rows=tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": len(self.prompts),
            "scored": len(self.prompts) - self.failed,
            "failed": self.failed,
            "not_finite": self.not_finite,
            "means": self.means,
            "tasks": self.tasks,
        }


def evaluate_model(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    config: EvaluationConfig,
    *,
    height: int | None = None,
    width: int | None = None,
    micro_batch_size: int = 64,
    mixed_precision: str = "bf16",
    on_images: OnImages | None = None,
) -> Evaluation:
    """Draw and score images of every prompt.

    There are `config.images_per_prompt` images for every prompt, or `config.images_per_task` for every task:
    one for each row of `repeat_prompts`.

    Args:
        on_images: called once for each batch, in the order of the rows, before the batch is scored.
    """
    repeated = repeat_prompts(prompts, config)
    parts: list[RewardOutput] = []

    def score_part(part: slice, images: Tensor) -> None:
        if on_images is not None:
            on_images(part, images)
        asked = repeated[part]
        parts.append(score(images, [p.text for p in asked], [p.metadata for p in asked]))

    images, finite = render(
        model,
        repeated,
        image_seeds(config, len(repeated)),
        config,
        height=height,
        width=width,
        micro_batch_size=micro_batch_size,
        mixed_precision=mixed_precision,
        on_images=score_part,
    )
    output = without(~finite.numpy(), RewardOutput.cat(parts))
    return replace(summarize_scores(repeated, images, output), not_finite=int((~finite).sum()))


def without(broken: np.ndarray, output: RewardOutput) -> RewardOutput:
    """NaN for the images (B,) that are none, whatever a reward made of them."""
    columns = {k: np.where(broken, np.nan, v) for k, v in output.details.items()}
    return RewardOutput(np.where(broken, np.nan, output.values), columns)


def image_seeds(config: EvaluationConfig, n: int) -> list[int]:
    """The seeds of an evaluation's n images."""
    return [stream(EVALUATION, config.seed, i) for i in range(n)]


def render(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    config: EvaluationConfig,
    *,
    height: int | None = None,
    width: int | None = None,
    micro_batch_size: int = 64,
    mixed_precision: str = "bf16",
    cache: EmbedCache | None = None,
    recorder: Recorder | None = None,
    on_images: OnImages | None = None,
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) uint8 of N prompts, drawn as `config` says, and (N,) bool: whether its latents are finite,
    for pixels of uint8 do not show what was NaN. A `cache` outlives the call; a `recorder` remembers the way."""
    cache = cache or EmbedCache(model)
    guided = model.costs_a_forward(config.guidance_scale)
    texts = list(dict.fromkeys(p.text for p in prompts))
    row = {text: i for i, text in enumerate(texts)}
    solver = solver_step(config.solver, model.noise)
    latents, images = generate(
        model,
        cache(texts),
        torch.tensor([row[p.text] for p in prompts]),
        seeds,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        negative_embeds=cache([""]) if guided else None,
        height=height,
        width=width,
        micro_batch_size=micro_batch_size,
        mixed_precision=mixed_precision,
        step=recorder.around(solver) if recorder else solver,
        on_images=on_images,
    )
    return images, latents.isfinite().flatten(1).all(1).cpu()


def repeat_prompts(prompts: Sequence[Prompt], config: EvaluationConfig) -> list[Prompt]:
    """One prompt for every image that is to be made."""
    if config.images_per_task is None:
        return [p for p in prompts for _ in range(config.images_per_prompt)]
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    return [pool[i % len(pool)] for pool in by_task.values() for i in range(config.images_per_task)]


def summarize_scores(prompts: list[Prompt], images: Tensor, output: RewardOutput) -> Evaluation:
    """Means over images with a reward; GenEval's table where some reward reports `correct`."""
    mask = output.mask
    columns = {"reward": output.values, **output.details}
    means = {k: float(np.nanmean(v)) for k, v in columns.items() if np.isfinite(v).any()}
    correct = next((v for k, v in output.details.items() if k.endswith("/correct")), None)
    tasks = {}
    if correct is not None:
        kept = [(p.task, c) for p, c in zip(prompts, correct, strict=True) if np.isfinite(c)]
        tasks = summarize([t for t, _ in kept], [c for _, c in kept])
    return Evaluation(prompts, images, output.values, means, tasks, int((~mask).sum()))
