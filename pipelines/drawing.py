"""Settings with which images are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffalign.core.errors import UsageError


@dataclass(frozen=True)
class Drawing:
    """Settings of sampling images: the step count, guidance, size, solver, seeds and batches.

    Attributes:
        guidance_scale: None or 1 means no classifier-free guidance (for FLUX its default guidance embedding).
        size: (height, width) in pixels; None, or a side that is None, is the model's own.
        solver: name of a solver of `pipelines.solvers`; "default" is the scheduler.
        negative_prompt: prompt that classifier-free guidance leads away from.
        images_per_prompt: number of images of each prompt.
        images_per_task: number of images of each task, which replaces `images_per_prompt`.
        seed: seed from which the seeds of all images follow.
        micro_batch_size: images that are sampled at a time. It changes memory use, never results.
        mixed_precision: "bf16" (autocast) or "no".
    """

    num_inference_steps: int = 4
    guidance_scale: float | None = None
    size: tuple[int | None, int | None] | None = None
    solver: str = "default"
    negative_prompt: str = ""
    images_per_prompt: int = 1
    images_per_task: int | None = None
    seed: int = 0
    micro_batch_size: int = 64
    mixed_precision: str = "bf16"

    def __post_init__(self) -> None:
        least = {"num_inference_steps": 1, "images_per_prompt": 1, "micro_batch_size": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise UsageError(f"{name}={value} is too small. Set at least {bound}.")

    def batches(self, images: int) -> Iterator[slice]:
        """Yield the slices of a number of images that are sampled together."""
        for start in range(0, images, self.micro_batch_size):
            yield slice(start, min(start + self.micro_batch_size, images))
