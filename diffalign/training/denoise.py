"""One forward of the denoiser, as all of training computes it, and the size of its images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffalign.config import AnyRunConfig
from diffalign.core.precision import compute
from diffalign.pipelines.base import TextToImageModel
from diffalign.types import PromptEmbeds


def image_size(config: AnyRunConfig, model: TextToImageModel) -> tuple[int, int]:
    """(height, width) in pixels: as configured, else the model's own."""
    height, width = model.default_size
    return config.drawing.height or height, config.drawing.width or width


def predict(
    model: TextToImageModel,
    noisy: Tensor,
    times: Tensor,
    embeds: PromptEmbeds,
    *,
    mixed_precision: str,
    **guidance: Any,
) -> Tensor:
    """The prediction (B, C, H, W) for noisy latents (B, C, H, W) at timesteps (B,), under autocast or without.

    `guidance` are `guidance_scale` and `negative_embeds` of `TextToImageModel.predict`.
    """
    if mixed_precision == "no":  # without autocast inputs must have the dtype of the base
        noisy = noisy.to(embeds.prompt_embeds.dtype)
    with compute(noisy.device, mixed_precision):
        return model.predict(noisy, times, embeds, **guidance)
