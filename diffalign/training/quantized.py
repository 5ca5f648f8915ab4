"""Quantise a run's base model while it loads, and know its size before."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PipelineQuantizationConfig
from torch import nn

from diffalign.config import AnyRunConfig, ConfigError
from diffalign.pipelines.loading import open_folder
from diffalign.pipelines.places import Place, look
from diffalign.pipelines.registry import ModelSpec, resolve, source_of
from diffalign.quantization.apply import quantization_config, quantize_model
from diffalign.quantization.backends import BACKENDS, missing_on
from diffalign.quantization.layers import PackSpec
from diffalign.quantization.packed import pack_model, packable

FORMATS = {"int8": "int8", "int4": "int4", "nf4": "bnb-nf4", "fp8": "torchao-fp8wo"}
"""Backends by the value of `model.quantization`."""
BYTES = {"nf4": 0.5 + 4 / 64, "fp8": 1.0}
"""Bytes of a weight in the formats of libraries.

The format nf4 has a float32 scale for 64 weights.
"""
DENOISERS = ("transformer", "unet")


def check_quantization(config: AnyRunConfig, device: torch.device | str) -> None:
    """Check that a run's base model can be quantised as configured.

    No weights are read.

    Raises:
        ConfigError: a package or a device is missing, or the model is quantised already.
    """
    kind, name = config.model.quantization, config.model.name
    if kind is None:
        return
    missing = missing_on(FORMATS[kind], device)
    if missing is not None:
        others = " or ".join(k for k, b in FORMATS.items() if missing_on(b, device) is None)
        raise ConfigError(
            f"needs {missing}. Set {others} instead", setting="model.quantization", value=kind
        )
    spec, place = _source(name)
    if place is None or place.kind == "file":
        return
    folder = open_folder(place, {"revision": config.model.revision or spec.revision})
    for part in set(DENOISERS) & set(folder.index):
        if (folder.component_config(part) or {}).get("quantization_config"):
            raise ConfigError(
                f"{name} is quantised already. Remove the setting, or name the model in full precision",
                setting="model.quantization",
                value=kind,
            )


def loading_options(config: AnyRunConfig, device: torch.device | str) -> dict[str, Any]:
    """Return arguments with which `load_model` quantises the denoiser while it reads the weights.

    Return none for a model that must be loaded first: a single file, or a base with a LoRA in its weights.
    """
    kind = config.model.quantization
    if kind is None:
        return {}
    spec, place = _source(config.model.name)
    if spec.lora is not None or place is None or place.kind == "file":
        return {}
    options = quantization_config(FORMATS[kind], device=device, training=True)
    mapping = dict.fromkeys(DENOISERS, options)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def quantize_loaded(config: AnyRunConfig, denoiser: nn.Module) -> None:
    """Quantise a denoiser that was loaded in full precision, if the run is configured so.

    Raises:
        ConfigError: the format quantises only while a model loads.
    """
    kind = config.model.quantization
    if kind is None or getattr(denoiser, "is_quantized", False):
        return
    if not BACKENDS[FORMATS[kind]].quantises_loaded:
        raise ConfigError(
            f"this format quantises only while a folder is read, and {config.model.name} must be loaded first. Set "
            "int4 instead",
            setting="model.quantization",
            value=kind,
        )
    quantize_model(denoiser, FORMATS[kind], training=True)


def _source(name: str) -> tuple[ModelSpec, Place | None]:
    """Return a model's specification and the place of its files, if they are there."""
    spec = resolve(name)
    return spec, look(source_of(spec))


def pack_on_meta(denoiser: nn.Module, kind: str | None) -> int:
    """Quantise a denoiser on the meta device, and return further savings in bytes.

    The formats int8 and int4 have their own layers there. Formats of libraries leave the layers as they are.
    """
    if kind is None:
        return 0
    if kind not in BYTES:
        pack_model(denoiser, spec=PackSpec(BACKENDS[FORMATS[kind]].bits))
        return 0
    layers = [m for m in packable(denoiser).values() if isinstance(m, nn.Linear)]
    sizes = [(m.weight.numel(), m.weight.element_size()) for m in layers]
    return sum(int(count * (size - BYTES[kind])) for count, size in sizes)
