"""Options of an acceleration, each applied to a pipeline with the step that undoes it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from diffalign.acceleration.tap import denoiser_name
from diffalign.acceleration.undo import Undo
from diffalign.core.errors import UsageError

logger = logging.getLogger(__name__)
GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Hooks of diffusers' group offloading."""


class Inapplicable(UsageError):
    """Option that cannot be applied to a pipeline."""

    def __init__(
        self, option: str, value: Any, why: str, remedy: str = "Leave the option out"
    ) -> None:
        self.option, self.why, self.remedy = option, why.rstrip("."), remedy
        super().__init__(f"{option}={value!r}: {self.why}. {remedy}.")


def denoiser_of(pipeline: Any) -> Any:
    """Return a pipeline's denoiser."""
    return getattr(pipeline, str(denoiser_name(pipeline)))


def quantize(pipeline: Any, backend: str, undo: Undo) -> None:
    """Put a quantised copy of the denoiser into the pipeline; keep the original."""
    from diffalign.quantization.apply import quantize_model

    name, original = str(denoiser_name(pipeline)), denoiser_of(pipeline)
    twin = copy.deepcopy(original)
    try:
        quantize_model(twin, backend)
    except UsageError as error:
        raise Inapplicable("quantize", backend, str(error)) from error
    pipeline.register_modules(**{name: twin})
    device = original.device
    if device.type == "cuda":
        original.to("cpu")

    def put_back() -> None:
        if names := list(getattr(twin, "peft_config", None) or {}):
            logger.warning(
                "restore: the LoRA %s was loaded onto the quantised weights, and is gone with them; load it again",
                ", ".join(names),
            )
        original.to(device)
        pipeline.register_modules(**{name: original})

    undo.add(put_back)


def lay_out(pipeline: Any, undo: Undo) -> None:
    """Lay out the weights of convolutions with their channels last, in denoiser and decoder.

    The values stay, and so do weights that are laid out otherwise.
    """
    parts = [denoiser_of(pipeline), getattr(pipeline, "vae", None)]
    weights = [w for part in parts if part is not None for w in part.parameters()]
    weights = [w for w in weights if w.ndim == 4 and w.is_floating_point() and w.is_contiguous()]
    if not weights:
        raise Inapplicable(
            "layout", "channels_last", "neither denoiser nor decoder has convolutions"
        )
    strides = [(weight, weight.stride()) for weight in weights]

    def put_back() -> None:
        for weight, stride in strides:
            plain = torch.empty_strided(
                weight.shape, stride, dtype=weight.dtype, device=weight.device
            )
            weight.data = plain.copy_(weight.data)

    undo.add(put_back)
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def offload(pipeline: Any, kind: str, undo: Undo) -> None:
    """Offload the parts of a pipeline to the CPU, by diffusers."""
    device = denoiser_of(pipeline).device

    def put_back() -> None:
        if kind == "model":
            pipeline.remove_all_hooks()
        else:
            _remove_group_offload(pipeline)
        pipeline.to(device)

    undo.add(put_back)
    if kind == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level")


def _remove_group_offload(pipeline: Any) -> None:
    from diffusers.hooks import HookRegistry

    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            registry = HookRegistry.check_if_exists_or_initialize(part)
            for hook in GROUP_HOOKS:
                registry.remove_hook(hook, recurse=True)


def save_memory(vae: Any, kind: str, undo: Undo) -> None:
    """Turn slicing or tiling of an autoencoder on."""
    if not hasattr(vae, f"enable_{kind}"):
        raise Inapplicable("vae", kind, f"{type(vae).__name__} has no {kind}")
    if getattr(vae, f"use_{kind}", False):
        return
    undo.add(getattr(vae, f"disable_{kind}"))
    getattr(vae, f"enable_{kind}")()
