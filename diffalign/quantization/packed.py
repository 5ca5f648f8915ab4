"""Which layers of a model are packed, and packing them in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from diffalign.core.errors import UsageError
from diffalign.quantization.integer import IntegerLinear, StepClock, packed_like
from diffalign.quantization.layers import PackSpec
from diffalign.quantization.observer import ActivationScales

SKIP = (
    "conv_in",
    "conv_out",
    "proj_out",
    "x_embedder",
    "patch_embed",
    "pos_embed",
    "time_embedding",
    "add_embedding",
    "time_embed",
    "time_text_embed",
)
"""Where latents and time enter a denoiser and where its prediction leaves it: on the Shapes denoisers these two to four
per cent of the weights make a quarter to a half of the error of 4 bits."""
MIN_WEIGHTS = 4096


def packable(
    module: nn.Module, *, skip: Sequence[str] = SKIP, min_weights: int = MIN_WEIGHTS
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of a model that get packed, by name.

    Args:
        module: subclasses of nn.Linear and nn.Conv2d in it are left alone, as they use their weights in their own ways.
        skip: full names of layers, or of modules around them, that keep their weights; with * for any text.
        min_weights: smaller layers keep their weights, too.

    Raises:
        UsageError: no layer is left.
    """
    found = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and type(layer) in (nn.Linear, nn.Conv2d)
        and layer.weight.numel() >= min_weights
        and not any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in skip)
    }
    if not found:
        raise UsageError(
            f"nothing to quantise: no layer of this {type(module).__name__} that is not skipped has "
            f"{min_weights} weights"
        )
    return found


def pack_model(
    module: nn.Module,
    *,
    spec: PackSpec | None = None,
    skip: Sequence[str] = SKIP,
    min_weights: int = MIN_WEIGHTS,
    input_scales: Mapping[str, Tensor] | None = None,
    activations: ActivationScales | None = None,
) -> list[str]:
    """Pack a model's layers in place, one at a time. On the meta device only shapes change.

    Args:
        module: without adapters.
        input_scales: from `lowrank.collect_input_scales`, for a low-rank branch.
        activations: from `observer.InputObserver`, for as many timesteps as `spec.activation_steps`.

    Returns:
        Names of the packed layers.

    Raises:
        UsageError: it has adapters, is quantised already, has weights that are not finite, or nothing to pack.
    """
    refuse_twice(module)
    spec = spec or PackSpec()
    layers = packable(module, skip=skip, min_weights=min_weights)
    names = list(layers)
    for name in names:
        layer = layers.pop(name)  # the last reference but the model's
        packed = packed_like(layer, spec)
        if not layer.weight.is_meta:
            packed.fill(layer.weight, name=name, input_scale=(input_scales or {}).get(name))
            if isinstance(packed, IntegerLinear):
                packed.calibrate(activations.scales.get(name) if activations else None)
        replace(module, name, packed)
    if activations is not None:
        StepClock(activations.timesteps).attach(module)
    return names


def refuse_twice(module: nn.Module) -> None:
    """UsageError for a model that is quantised already or has adapters."""
    if getattr(module, "peft_config", None):
        raise UsageError("a model is quantised before it gets adapters, not after")
    if getattr(module, "is_quantized", False):
        raise UsageError(f"this {type(module).__name__} is quantised already")


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another."""
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)
