"""Select the layers of a model to pack, and pack them in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from diffalign.core.errors import UsageError
from diffalign.quantization.integer import IntegerLinear, StepClock, packed_like
from diffalign.quantization.layers import PackedLayer, PackSpec
from diffalign.quantization.moments import Moments, is_measured
from diffalign.quantization.observer import ActivationScales
from diffalign.quantization.rounding import curvatures

logger = logging.getLogger(__name__)

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
"""Layers at a denoiser's input, time embedding and output, which are not packed.

On the Shapes denoisers these 2 to 4 % of the weights cause a quarter to a half of the error of 4 bits.
"""
MIN_WEIGHTS = 4096


@dataclass(frozen=True)
class Specs:
    """Settings of packed weights, with bits by layer or the same for all."""

    spec: PackSpec
    bits: Mapping[str, int] | None = None

    def of(self, name: str) -> PackSpec:
        """Return the settings of a layer.

        Raises:
            UsageError: bits are given by layer, and this one has none.
        """
        if self.bits is None:
            return self.spec
        if name not in self.bits:
            raise UsageError(
                f"bits: the layer {name} has no number of bits. Give one for each layer that gets packed."
            )
        return replace_field(self.spec, bits=self.bits[name])


def packable(
    module: nn.Module, *, skip: Sequence[str] = SKIP, min_weights: int = MIN_WEIGHTS
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of a model that get packed, by name.

    Args:
        module: the model. Subclasses of nn.Linear and nn.Conv2d are skipped, since they may use their weights
            differently.
        skip: full names of layers, or of modules around them, that keep their weights; * stands for any text.
        min_weights: size below which layers keep their weights.

    Raises:
        UsageError: no layer is left.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and type(layer) in (nn.Linear, nn.Conv2d)
        and layer.weight.numel() >= min_weights
        and not any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in skip)
    }
    if not layers:
        raise UsageError(
            f"nothing to quantise: no layer of this {type(module).__name__} that is not skipped has "
            f"min_weights={min_weights} weights. Lower min_weights or shorten skip."
        )
    return layers


def pack_model(
    module: nn.Module,
    *,
    spec: PackSpec | None = None,
    skip: Sequence[str] = SKIP,
    min_weights: int = MIN_WEIGHTS,
    input_scales: Mapping[str, Tensor] | None = None,
    activations: ActivationScales | None = None,
    moments: Iterable[Mapping[str, Moments]] | None = None,
    bits: Mapping[str, int] | None = None,
) -> list[str]:
    """Pack a model's layers in place, one at a time. On the meta device only shapes change.

    Args:
        module: model without adapters.
        spec: settings of packed weights; the defaults if None.
        skip: layers that are not packed, as in `packable`.
        min_weights: size below which layers are not packed.
        input_scales: result of `lowrank.collect_input_scales`, for a low-rank branch.
        activations: result of `observer.InputObserver`, for `spec.activation_steps` timesteps.
        moments: result of `moments.collect_moments`, for codes by GPTQ; None for the nearest codes. The model stays as
            it is until all parts are through, so that every part is measured on full-precision weights.
        bits: bits of every layer by name, in place of the spec's.

    Returns:
        Names of the packed layers.

    Raises:
        UsageError: the model has adapters, is quantised already, has weights that are not finite, or no layer to pack.
    """
    check_unquantized(module)
    specs = Specs(spec or PackSpec(), bits)
    layers = packable(module, skip=skip, min_weights=min_weights)
    names = list(layers)
    scales = activations.scales if activations else {}
    rounded = {} if moments is None else dict(_by_gptq(layers, moments, specs))
    for name in names:
        # The model then has the only reference, so that the layer is freed when it is replaced.
        layer = layers.pop(name)
        packed = rounded.pop(name, None)
        if packed is None:
            packed = packed_like(layer, specs.of(name))
            if not layer.weight.is_meta:
                packed.fill(layer.weight, name=name, input_scale=(input_scales or {}).get(name))
        if isinstance(packed, IntegerLinear) and not packed.weight.is_meta:
            packed.calibrate(scales.get(name))
        replace(module, name, packed)
    if activations is not None:
        StepClock(activations.timesteps).attach(module)
    return names


def _by_gptq(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    moments: Iterable[Mapping[str, Moments]],
    specs: Specs,
) -> Iterator[tuple[str, PackedLayer]]:
    """Yield the layers that have moments, packed, by name."""
    rows: dict[str, int] = {}
    for name, measured, curvature in curvatures(layers, moments):
        packed = packed_like(layers[name], specs.of(name))
        scale = measured.input_scale if specs.spec.svd_rank else None
        packed.fill(layers[name].weight, name=name, input_scale=scale, curvature=curvature)
        rows[name] = measured.rows
        yield name, packed
    _warn(layers, rows)


def _warn(layers: Mapping[str, nn.Linear | nn.Conv2d], rows: Mapping[str, int]) -> None:
    """Warn of layers that no prompt reached, and of layers with fewer rows than inputs."""
    missed = [n for n, layer in layers.items() if n not in rows and is_measured(layer)]
    if missed:
        logger.warning(
            f"moments: no prompt reached {len(missed)} of {len(layers)} layers, for instance {missed[0]}; their codes "
            "are the nearest ones"
        )
    widths = {n: layers[n].weight[0].numel() for n in rows}
    short = sorted((n for n in rows if rows[n] < widths[n]), key=lambda n: rows[n] / widths[n])
    if short:
        logger.warning(
            f"moments: {len(short)} of {len(layers)} layers have fewer rows than inputs, at worst {short[0]} with "
            f"{rows[short[0]]} rows for {widths[short[0]]} inputs; their rounding is damped, and "
            "more prompts fit it better"
        )


def check_rounding(bits: int, *, calibrated: bool) -> None:
    """Raise UsageError for 2 bits without moments of the layers' inputs."""
    if bits == 2 and not calibrated:
        raise UsageError(
            "bits=2: rounding to nearest leaves the weights 2 bits in name only; on both Shapes students it takes more "
            "than half of GenEval. Calibrate a loaded model (`diffalign quantize` with prompts and rounding=gptq), or "
            "use int3."
        )


def check_unquantized(module: nn.Module) -> None:
    """Raise UsageError if a model is quantised already or has adapters."""
    if getattr(module, "peft_config", None):
        raise UsageError(
            f"this {type(module).__name__} has adapters: quantise a model before it gets adapters."
        )
    if getattr(module, "is_quantized", False):
        raise UsageError(
            f"this {type(module).__name__} is quantised already. Load the model in full precision."
        )


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer of the module."""
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)
