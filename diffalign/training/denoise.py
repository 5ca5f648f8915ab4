"""Compute the forward of the denoiser that all training methods share, and the image size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffalign.config import AnyRunConfig
from diffalign.core.precision import compute
from diffalign.pipelines.base import TextToImageModel
from diffalign.types import PromptEmbeds


def image_size(config: AnyRunConfig, model: TextToImageModel) -> tuple[int, int]:
    """Return (height, width) in pixels: the configured size, else the model's default."""
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
    """Return the prediction (B, C, H, W) of a model for noisy latents.

    Args:
        noisy: noisy latents (B, C, H, W).
        times: timesteps (B,).
        embeds: embeddings of the prompts (B rows).
        mixed_precision: "bf16" for autocast, or "no".
        guidance: `guidance_scale` and `negative_embeds` of `TextToImageModel.predict`.
    """
    # without autocast the inputs must have the dtype of the base model
    if mixed_precision == "no":
        noisy = noisy.to(embeds.prompt_embeds.dtype)
    with compute(noisy.device, mixed_precision):
        return model.predict(noisy, times, embeds, **guidance)
