"""Guidance distillation: one forward with a guidance embedding learns what classifier-free guidance makes of two.

How FLUX.1-dev came by its guidance embedding. (Meng et al. 2023, "On Distillation of Guided Diffusion Models", stage
one)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.diffusion.paths import expand
from diffalign.pipelines.base import TextToImageModel
from diffalign.scripts.shapes.denoiser import Captioned, Pretraining
from diffalign.scripts.shapes.evaluation import NO_GUIDANCE
from diffalign.types import PromptEmbeds

GUIDANCE_RANGE = (1.0, 6.0)


def frozen_copy(model: TextToImageModel) -> TextToImageModel:
    """Return a copy of the model with a denoiser of its own."""
    teacher = copy.copy(model)
    teacher.pipeline = copy.copy(model.pipeline)
    teacher.pipeline.transformer = copy.deepcopy(model.denoiser).eval().requires_grad_(False)
    return teacher


@dataclass
class GuidanceDistillation(Pretraining):
    """The model as it is at construction, guided, is the teacher of itself.

    Raises:
        UsageError: the model has no guidance embedding.
    """

    evaluated_guidance: ClassVar[float] = 3.5
    aligned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.model.guidance_is_embedded:
            raise UsageError(f"{self.model.family} has no guidance embedding to distil into")
        super().__post_init__()
        self.teacher = frozen_copy(self.model)

    def batch(self, data: Captioned) -> tuple[Any, ...]:
        latents, noise, timesteps, embeds, _ = super().batch(data)
        null = data.padded_like(embeds).repeat_first(len(embeds)).to(self.device)
        low, high = GUIDANCE_RANGE
        guidance = low + (high - low) * torch.rand(len(embeds), generator=self.rng)
        guidance = guidance.to(self.device)
        return latents, noise, timesteps, PromptEmbeds.cat([embeds, null]), guidance

    def _loss(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        guidance: Tensor,
    ) -> Tensor:
        """`embeds` (2 B, ...): the prompts, then as many null prompts; `guidance` (B,)."""
        noisy = self.model.noise.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            both = self.teacher.predict(
                torch.cat([noisy] * 2),
                torch.cat([timesteps] * 2),
                embeds,
                guidance_scale=NO_GUIDANCE,
            )
            cond, uncond = both.float().chunk(2)
            target = uncond + expand(guidance, cond) * (cond - uncond)
        pred = self.model.predict(noisy, timesteps, embeds[: len(noisy)], guidance_scale=guidance)
        return (pred.float() - target).square().mean()
