"""Quantise a loaded model or pipeline in place, or a denoiser while it loads.

A saved model reloads in its quantised form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer

import diffalign.quantization.quantizer  # noqa: F401 (registers packed weights)
from diffalign.core.errors import UsageError
from diffalign.quantization.backend import Work
from diffalign.quantization.backends import BACKENDS, resolve
from diffalign.quantization.layers import PackSpec
from diffalign.quantization.moments import Moments
from diffalign.quantization.observer import ActivationScales
from diffalign.quantization.packed import MIN_WEIGHTS, SKIP, check_rounding, check_unquantized


def quantize_pipeline(
    pipeline: Any, backend: str = "auto", *, components: Sequence[str] = (), **options: Any
) -> dict[str, str]:
    """Quantise components of a loaded pipeline in place.

    Args:
        pipeline: a diffusers pipeline.
        backend: name of a backend, or "auto".
        components: names such as "text_encoder_2"; the denoiser if empty.
        options: options of `quantize_model`.

    Returns:
        The backend of each component, by name.

    Raises:
        UsageError: as in `quantize_model`, or the pipeline does not have a component.
    """
    parts = {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module)}
    names = list(components) or [n for n in ("unet", "transformer") if n in parts]
    for name in names:
        if name not in parts:
            raise UsageError(
                f"components={name}: the pipeline has no such component. Choose from {', '.join(parts)}."
            )
    return {name: quantize_model(parts[name], backend, **options) for name in names}


def quantize_model(
    model: Any,
    backend: str = "auto",
    *,
    group_size: int | None = 64,
    svd_rank: int = 0,
    input_scales: Mapping[str, Tensor] | None = None,
    activations: ActivationScales | None = None,
    moments: Iterable[Mapping[str, Moments]] | None = None,
    **layers: Any,
) -> str:
    """Quantise a loaded denoiser or text encoder in place.

    After that, `from_pretrained` reloads what the model's `save_pretrained` writes.

    Args:
        model: model of diffusers or transformers, without adapters.
        backend: name of a backend, or "auto". Adapters can be trained over the one that `backends.resolve` returns
            with `training`.
        group_size: group size of packed weights, as in `layers.PackSpec`.
        svd_rank: rank of the low-rank branch of packed weights, and of a denoiser's linear layers beside torchao's
            8-bit weights.
        input_scales: result of `lowrank.collect_input_scales`, to which the branch is fitted.
        activations: result of `observer.InputObserver`, which "int8-static" needs.
        moments: result of `moments.collect_moments`, by which packed weights are rounded (GPTQ); None for rounding to
            nearest.
        layers: `skip` and `min_weights` of `packed.packable`, which select the layers to quantise; `bits` of every
            layer by name, which "mixed" needs (`tuning.allocation.choose_bits`).

    Returns:
        The name of the backend, which "auto" leaves open.

    Raises:
        UsageError: as in `backends.resolve` and `packed.pack_model`; the backend does not have one of the options, or
            quantises only while it loads.
    """
    name = resolve(backend, device=model.device, model=model)
    method = BACKENDS[name]
    spec = _spec(name, group_size, svd_rank, activations)
    check_unquantized(model)
    _check_rounding(name, spec, layers.get("bits"), calibrated=moments is not None)
    if input_scales is not None and not svd_rank:
        raise UsageError(
            "svd_rank=0: input_scales are used by a low-rank branch only. Set svd_rank."
        )
    branch = method.takes_branch and isinstance(model, diffusers.ModelMixin)
    _check_options(name, spec, branch=branch)
    if not method.quantises_loaded:
        raise UsageError(
            f"backend={name}: a loaded model cannot be quantised by this backend. Pass "
            f"quantization_config({name!r}) to from_pretrained."
        )
    selection = {"skip": SKIP, "min_weights": MIN_WEIGHTS, **layers}
    work = Work(
        spec, input_scales=input_scales, activations=activations, moments=moments, **selection
    )
    _attach(model, method.quantize(model, work))
    return name


def quantization_config(
    backend: str,
    *,
    device: torch.device | str,
    model: type | None = None,
    training: bool = False,
    group_size: int | None = 64,
    svd_rank: int = 0,
    skip: Sequence[str] = SKIP,
) -> Any:
    """Return the configuration with which diffusers quantises a denoiser while it loads.

    The result is the argument `quantization_config` of `from_pretrained`.

    Args:
        backend: name of a backend, or "auto".
        device: device on which the model will run.
        model: class of the model, for "auto".
        training: whether adapters will be trained over the model.
        group_size: group size of packed weights, as in `layers.PackSpec`.
        svd_rank: rank of the low-rank branch of packed weights, which is fitted to the weights only.
        skip: layers that are not quantised, as in `packed.packable`.

    Raises:
        UsageError: as in `backends.resolve`, or the backend does not have one of the options.
    """
    name = resolve(backend, device=device, model=model, training=training)
    spec = _spec(name, group_size, svd_rank, None)
    _check_options(name, spec)
    _check_rounding(name, spec, None, calibrated=False)
    return BACKENDS[name].config(spec, skip)


def _spec(
    name: str, group_size: int | None, svd_rank: int, activations: ActivationScales | None
) -> PackSpec:
    backend = BACKENDS[name]
    if backend.activations != (activations is not None):
        raise UsageError(
            f"backend={name}: this backend needs calibrated scales of activations. Calibrate a loaded model "
            "(`diffalign quantize` with prompts)."
            if backend.activations
            else f"backend={name}: this backend leaves activations in 16 bits and takes no scales for them. Use "
            "int8-static."
        )
    if activations is not None:
        return PackSpec(backend.bits, None, svd_rank, len(activations.timesteps))
    if backend.token_scales:
        return PackSpec(backend.bits, None, svd_rank, token_scales=True)
    return PackSpec(backend.bits, group_size, svd_rank)


def _check_rounding(
    name: str, spec: PackSpec, bits: Mapping[str, int] | None, *, calibrated: bool
) -> None:
    """Raise UsageError if a backend cannot round in this way, with moments (`calibrated`) or without."""
    if BACKENDS[name].is_packed:
        check_rounding(spec.bits, calibrated=calibrated)
        _check_bits(name, bits, calibrated=calibrated)
    elif calibrated:
        raise UsageError(
            f"backend={name}: this backend rounds to nearest and takes no moments. Use {_packed_names()}."
        )


def _check_bits(name: str, bits: Mapping[str, int] | None, *, calibrated: bool) -> None:
    """Raise UsageError if bits by layer are missing, or belong to another backend."""
    if BACKENDS[name].by_layer and (bits is None or not calibrated):
        raise UsageError(
            f"backend={name}: each layer needs its number of bits, and moments to round with. Calibrate a loaded model "
            "(`diffalign quantize` with prompts and bits_per_weight)."
        )
    if bits is not None and not BACKENDS[name].by_layer:
        raise UsageError(f"backend={name}: this backend has one number of bits. Use mixed.")


def _packed_names() -> str:
    """Return the names of the formats of this project, for messages."""
    return ", ".join(name for name, backend in BACKENDS.items() if backend.is_packed)


def _attach(model: Any, config: Any) -> None:
    """Set the attributes that from_pretrained sets on a quantised model and save_pretrained reads."""
    if isinstance(model, diffusers.ModelMixin):
        quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
        quantizer.validate_environment(device_map=None)
        model.register_to_config(quantization_config=config)
    else:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method


def _check_options(name: str, spec: PackSpec, *, branch: bool = False) -> None:
    """Raise UsageError for options that a backend does not have; `branch`: it has `svd_rank`."""
    if BACKENDS[name].is_packed:
        return
    if spec != PackSpec(spec.bits, svd_rank=spec.svd_rank if branch else 0):
        able = ", ".join(n for n, b in BACKENDS.items() if b.takes_branch)
        raise UsageError(
            f"backend={name}: this backend has {'no group_size' if branch else 'neither group_size nor svd_rank'}. "
            f"int4 and int8 have both; svd_rank for a loaded denoiser also works with {able}."
        )
