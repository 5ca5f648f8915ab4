"""Load a run's base model, and compute its forwards and sampling settings, for all methods."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from diffalign.config import AnyRunConfig, ConfigError, EvaluationConfig
from diffalign.core.files import check_target
from diffalign.core.fingerprint import UnknownWeights, of_pipeline
from diffalign.core.precision import compute
from diffalign.evaluation.score import drawing_of
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.embed_folder import EmbedFolder
from diffalign.pipelines.offloading import Resting, offload_blocks
from diffalign.pipelines.registry import load_model
from diffalign.training.optimizers import check_optimizer
from diffalign.training.quantized import check_quantization, loading_options, quantize_loaded
from diffalign.types import PromptEmbeds, Size

logger = logging.getLogger(__name__)


def prepare_model(config: AnyRunConfig, device: torch.device) -> TextToImageModel:
    """Load a run's frozen base model, with its attention and memory settings.

    Raises:
        UserError: the model cannot be loaded, or a memory setting cannot be met on this device.
    """
    c = config.model
    check_quantization(config, device)
    check_optimizer(config.optimizer, device)
    if c.embeds_cache is not None:
        check_target(c.embeds_cache, setting="model.embeds_cache")
    options = loading_options(config, device)
    later = c.offload_encoders or c.offload_blocks or (c.quantization is not None and not options)
    model = load_model(
        c.name,
        dtype=getattr(torch, c.dtype),
        revision=c.revision,
        max_sequence_length=c.max_sequence_length,
        device="cpu" if later else device,
        **options,
    )
    warn_of_student(model, c.name)
    quantize_loaded(config, model.denoiser)
    if later:
        _place(model, config, device)
    if c.embeds_cache is not None:
        model.embed_folder = EmbedFolder(c.embeds_cache, model)
    for part in model.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    if c.attention_backend is not None:
        set_attention_backend(model, c.attention_backend)
    if c.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    return model


def base_digest(model: TextToImageModel) -> dict[str, str]:
    """Return the fingerprint of a run's base model, by the setting that names it.

    A name may get other weights while a run is interrupted. The result is empty if the weights are not in memory.
    """
    try:
        return {"model.name": of_pipeline(model.pipeline)}
    except UnknownWeights:
        return {}


def warn_of_student(model: TextToImageModel, name: str) -> None:
    """Warn of training a few-step student without guidance, such as FLUX.2 [klein] or Z-Image-Turbo."""
    if model.is_distilled:
        logger.warning(
            "model.name=%s: this is a few-step student. Users of other trainers report that its reward rises and its "
            "images then blur. Train the base model, and load the LoRA into the student.",
            name,
        )


def _place(model: TextToImageModel, config: AnyRunConfig, device: torch.device) -> None:
    """Move a model's parts from CPU memory to where they begin."""
    c, denoiser = config.model, model.denoiser
    if c.offload_blocks:
        offload_blocks(denoiser, device)
    else:
        denoiser.to(device)
    if c.offload_encoders:
        model.resting = Resting(model.pipeline, denoiser, device)
        return
    for part in model.pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part is not denoiser:
            part.to(device)


def image_size(config: AnyRunConfig, model: TextToImageModel) -> Size:
    """Return (height, width) in pixels: the configured size, else the model's default."""
    return model.image_size((config.drawing.height, config.drawing.width))


def evaluation_drawing(
    config: AnyRunConfig, size: Size, evaluation: EvaluationConfig | None = None
) -> Drawing:
    """Return the sampling settings of a run's evaluations.

    Args:
        size: (height, width) of the images in pixels.
        evaluation: settings that replace those of the run.
    """
    return drawing_of(
        evaluation or config.evaluation,
        size=size,
        micro_batch_size=config.drawing.micro_batch_size,
        mixed_precision=config.training.mixed_precision,
    )


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


def set_attention_backend(model: TextToImageModel, backend: str) -> None:
    """Set the attention backend of a model.

    Raises:
        ConfigError: the backend is unknown or not installed, or the model's family would ignore it.
    """
    processors = getattr(model.denoiser, "attn_processors", {}).values()
    if not any(hasattr(p, "_attention_backend") for p in processors):
        raise ConfigError(
            f"model.attention_backend: diffusers' {model.family} attention takes no backend and would ignore "
            f"{backend!r}. Remove the setting"
        )
    try:
        model.denoiser.set_attention_backend(backend)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{error}. Choose another backend, or remove the setting",
            setting="model.attention_backend",
        ) from error
