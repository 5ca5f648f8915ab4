"""Quantising a loaded model or pipeline in place, so that what is saved of it reloads, or a denoiser while it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import diffusers
import torch
import transformers
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer

from diffalign.core.errors import UsageError
from diffalign.quantization.backends import BACKENDS, Backend, resolve
from diffalign.quantization.branches import BranchConfig
from diffalign.quantization.layers import PackSpec
from diffalign.quantization.observer import ActivationScales
from diffalign.quantization.packed import MIN_WEIGHTS, SKIP, pack_model, packable, refuse_twice
from diffalign.quantization.quantizer import PackedConfig, PackedTextConfig


def quantize_pipeline(
    pipeline: Any, backend: str = "auto", *, components: Sequence[str] = (), **options: Any
) -> dict[str, str]:
    """Quantise components of a loaded pipeline in place.

    Args:
        components: names such as "text_encoder_2"; none: the denoiser.
        options: of `quantize_model`.

    Returns:
        The backend of each.

    Raises:
        UsageError: as in `quantize_model`, or a component that the pipeline does not have.
    """
    parts = {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module)}
    chosen = list(components) or [n for n in ("unet", "transformer") if n in parts]
    for name in chosen:
        if name not in parts:
            raise UsageError(f"no component {name!r} to quantise; there are {', '.join(parts)}")
    return {name: quantize_model(parts[name], backend, **options) for name in chosen}


def quantize_model(
    model: Any,
    backend: str = "auto",
    *,
    training: bool = False,
    group_size: int | None = 64,
    svd_rank: int = 0,
    input_scales: Mapping[str, Tensor] | None = None,
    activations: ActivationScales | None = None,
    skip: Sequence[str] = SKIP,
    min_weights: int = MIN_WEIGHTS,
) -> str:
    """Quantise a denoiser or a text encoder where it is; its `save_pretrained` writes what `from_pretrained` reloads.

    Args:
        model: of diffusers or transformers, without adapters.
        training: adapters will be trained over it.
        group_size: of packed weights, as in `layers.PackSpec`.
        svd_rank: of packed weights, likewise; and of a denoiser's linear layers beside torchao's 8-bit weights.
        input_scales: from `lowrank.collect_input_scales`, to fit the branch of `svd_rank` to.
        activations: from `observer.InputObserver`, which "int8-static" needs.
        skip: as in `packed.packable`.
        min_weights: likewise.

    Returns:
        The backend's name, which "auto" leaves open.

    Raises:
        UsageError: as in `backends.resolve` and `packed.pack_model`; options that the backend does not have; a backend
            that quantises only while it loads.
    """
    name = resolve(backend, device=model.device, model=model, training=training)
    chosen = BACKENDS[name]
    spec = _spec(name, group_size, svd_rank, activations)
    refuse_twice(model)
    if input_scales is not None and not svd_rank:
        raise UsageError("input scales are for a low-rank branch: set svd_rank, too")
    if chosen.is_packed:
        config = _packed_config(model, spec, skip, min_weights)
        if activations is not None:
            config.activation_timesteps = list(activations.timesteps)
        pack_model(
            model,
            spec=spec,
            skip=config.skip,
            min_weights=min_weights,
            input_scales=input_scales,
            activations=activations,
        )
    else:
        branch = chosen.takes_branch and isinstance(model, diffusers.ModelMixin)
        _refuse_options(name, spec, branch=branch)
        if not chosen.settings:
            raise UsageError(
                f"{name} quantises while it loads: give from_pretrained quantization_config({name!r})"
            )
        config = _torchao_in_place(model, chosen, spec, skip, min_weights, input_scales)
    _attach(model, config)
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
    """What diffusers takes as `quantization_config` to quantise a denoiser while it loads, layer by layer.

    Args:
        device: where the model will run.
        model: its class, for "auto".
        training: adapters will be trained over it.
        group_size: of packed weights, as in `layers.PackSpec`.
        svd_rank: of packed weights, likewise; the branch is fitted to the weights alone.
        skip: as in `packed.packable`.

    Raises:
        UsageError: as in `backends.resolve`, or options that the backend does not have.
    """
    name = resolve(backend, device=device, model=model, training=training)
    chosen = BACKENDS[name]
    spec = _spec(name, group_size, svd_rank, None)
    if chosen.is_packed:
        return PackedConfig(spec.bits, group_size, skip, svd_rank=svd_rank)
    _refuse_options(name, spec)
    if chosen.settings:
        from torchao.quantization import FqnToConfig

        # by full name: `modules_to_not_convert` would take "proj_out" for that of each of FLUX's blocks, too
        kept = {f"re:{p.replace('.', '[.]').replace('*', '.*')}([.].*)?": None for p in skip}
        return diffusers.TorchAoConfig(FqnToConfig({**kept, "_default": _torchao(chosen)}))
    if chosen.bits == 8:
        return diffusers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(skip),
    )


def _spec(
    name: str, group_size: int | None, svd_rank: int, activations: ActivationScales | None
) -> PackSpec:
    backend = BACKENDS[name]
    if backend.activations != (activations is not None):
        raise UsageError(
            f"{name} needs scales of activations: calibrate a loaded model (`diffalign quantize --prompts`)"
            if backend.activations
            else f"{name} leaves activations in 16 bits and takes no scales of them; int8-static does"
        )
    if activations is not None:
        return PackSpec(backend.bits, None, svd_rank, len(activations.timesteps))
    return PackSpec(backend.bits, group_size, svd_rank)


def _packed_config(
    model: Any, spec: PackSpec, skip: Sequence[str], min_weights: int
) -> PackedConfig:
    of_diffusers = isinstance(model, diffusers.ModelMixin)
    kind = PackedConfig if of_diffusers else PackedTextConfig
    config = kind(spec.bits, spec.group_size, skip, min_weights, spec.svd_rank)
    if of_diffusers or model.dtype == torch.float16:  # T5's overflow, but in float16 only
        config.keep(model._keep_in_fp32_modules or ())
    return config


def _torchao_in_place(
    model: Any,
    backend: Backend,
    spec: PackSpec,
    skip: Sequence[str],
    min_weights: int,
    input_scales: Mapping[str, Tensor] | None,
) -> diffusers.TorchAoConfig | transformers.TorchAoConfig:
    from torchao.quantization import quantize_

    names = set(packable(model, skip=skip, min_weights=min_weights))
    settings = _torchao(backend)
    library = diffusers if isinstance(model, diffusers.ModelMixin) else transformers
    config = library.TorchAoConfig(settings)
    if spec.svd_rank:
        config = BranchConfig(settings, None, spec.svd_rank, skip, min_weights)
        config.split(model, input_scales)
    quantize_(model, settings, filter_fn=lambda m, name: name in names and isinstance(m, nn.Linear))
    return config


def _torchao(backend: Backend) -> Any:
    settings = getattr(import_module("torchao.quantization"), backend.settings)
    if backend.capability is None:
        return settings()
    from torchao.quantization import PerRow

    return settings(granularity=PerRow())


def _attach(model: Any, config: Any) -> None:
    """What from_pretrained leaves on a quantised model and save_pretrained looks for."""
    if isinstance(model, diffusers.ModelMixin):
        quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
        quantizer.validate_environment(device_map=None)
        model.register_to_config(quantization_config=config)
    else:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method


def _refuse_options(name: str, spec: PackSpec, *, branch: bool = False) -> None:
    """`branch`: whether it can have one."""
    if spec != PackSpec(spec.bits, svd_rank=spec.svd_rank if branch else 0):
        able = ", ".join(n for n, b in BACKENDS.items() if b.takes_branch)
        raise UsageError(
            f"{name} has {'no group_size' if branch else 'neither group_size nor svd_rank'}; int4 and int8 have, and a "
            f"denoiser loaded whole takes svd_rank with {able}"
        )
