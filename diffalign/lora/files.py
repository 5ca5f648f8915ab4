"""Load LoRAs into pipelines, merge them into weights, and save a run's own.

Every tensor of a file must have a place in the pipeline; otherwise nothing is loaded, and the error names what has
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import get_adapter_name
from peft import LoraConfig as PeftLoraConfig
from peft import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.core.errors import UsageError
from diffalign.lora import formats
from diffalign.lora.formats import Lora
from diffalign.lora.layer import Layer
from diffalign.lora.names import TRANSFORMER, UNET
from diffalign.lora.policies import CURRENT, check_mergeable
from diffalign.lora.source import WEIGHT_NAME, locate

NAMED = 3
"""Layers that an error names."""
NOT_MERGED = (
    "Merge into the plain base, then quantise what comes out; or load the LoRA without merging it."
)


def export_lora(denoiser: ModelMixin, pipeline: Any, folder: Path, *, name: str = CURRENT) -> Path:
    """Save an adapter for stock `load_lora_weights(folder)`, ComfyUI and every other program.

    The strength alpha / rank is multiplied into the second matrix, and alpha is the rank. Programs disagree about where
    alpha stands: most stock loaders refuse its tensors, and ComfyUI does not read diffusers' header. All of them take
    alpha to be the rank where none is given.
    """
    adapter = denoiser.peft_config[name]
    state = get_peft_model_state_dict(denoiser, adapter_name=name)
    strength = adapter.lora_alpha / adapter.r
    tensors = {
        key: (value.detach().float() * (strength if ".lora_B." in key else 1.0)).contiguous().cpu()
        for key, value in state.items()
    }
    metadata = {**adapter.to_dict(), "lora_alpha": adapter.r}
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
    folder.mkdir(parents=True, exist_ok=True)
    part = _part(pipeline)
    layers = {f"{part}_lora_layers": tensors, f"{part}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **layers)
    return folder / WEIGHT_NAME


def read_lora(source: str) -> Lora:
    """Read a LoRA by path or hub id. No model is needed; see `source.locate` and `formats.read`."""
    place = locate(source)
    return formats.read(place.file, place.config, unclear=place.unclear)


def load_lora(pipeline: Any, source: str | Lora) -> None:
    """Load a LoRA as adapters, under the name that stock `load_lora_weights` would choose.

    Args:
        pipeline: of diffusers.
        source: a folder, a file or a hub id, as `source.locate` reads it, or a LoRA that is read already.

    Raises:
        UsageError: nothing is there, or one of its layers has no place in the pipeline; then nothing is loaded.
    """
    lora = read_lora(source) if isinstance(source, str) else source
    places = _places(pipeline, lora)
    adapter = get_adapter_name(getattr(pipeline, _part(pipeline)))
    for part, layers in places.items():
        _install(getattr(pipeline, part), layers, adapter)


def merge_lora(pipeline: Any, source: str | Lora) -> None:
    """Add a LoRA into the pipeline's weights, in float32.

    Args:
        pipeline, source: as for `load_lora`.

    Raises:
        UsageError: as for `load_lora`, or weights are quantised; then nothing is changed.
    """
    lora = read_lora(source) if isinstance(source, str) else source
    places = _places(pipeline, lora)
    for part, layers in places.items():
        for name in layers:
            check_mergeable(getattr(pipeline, part).get_submodule(name), advice=NOT_MERGED)
    with torch.no_grad():
        for part, layers in places.items():
            component = getattr(pipeline, part)
            for name, layer in layers.items():
                weight = component.get_submodule(name).weight
                weight.data = _merged(weight.data, layer)


def check_places(pipeline: Any, lora: Lora) -> None:
    """Check that every layer of a LoRA has a place in a pipeline.

    The pipeline may be on the meta device.

    Raises:
        UsageError: a layer has no place, or another size.
    """
    _places(pipeline, lora)


def _merged(weight: Tensor, layer: Layer) -> Tensor:
    """Return the weight with the layer's update, in its own dtype."""
    down, up = (x.to(weight.device) for x in (layer.down, layer.up))
    total = weight.float() + Layer(down, up, layer.alpha).delta(weight.shape)
    if layer.magnitude is not None:
        # DoRA: rows have the length that the file says
        norm = total.flatten(1).norm(dim=1)
        ratio = layer.magnitude.to(weight.device) / norm
        total = total * ratio.view(-1, *[1] * (total.ndim - 1))
    return total.to(weight.dtype)


def _places(pipeline: Any, lora: Lora) -> dict[str, dict[str, Layer]]:
    """Return component -> module -> layer in the pipeline's own names and shapes. UsageError where one has no place."""
    places: dict[str, dict[str, Layer]] = {}
    missing: list[str] = []
    for named, layers in lora.parts.items():
        # kohya calls T5 the third encoder in FLUX's files as well
        flux = named == "text_encoder_3" and not hasattr(pipeline, named)
        part = "text_encoder_2" if flux else named
        component = getattr(pipeline, part, None)
        modules = dict(component.named_modules()) if component is not None else {}
        for name, layer in layers.items():
            own = name if name in modules else name.removeprefix("text_model.")
            module = modules.get(own)
            if not isinstance(module, nn.Linear | nn.Conv2d | BaseTunerLayer) and not hasattr(
                module, "in_features"
            ):
                missing.append(f"{part}.{name}")
                continue
            places.setdefault(part, {})[own] = _fitted(layer, module, f"{part}.{name}", lora.source)
    if missing:
        kind = type(getattr(pipeline, _part(pipeline))).__name__
        raise UsageError(
            f"{lora.source} is a LoRA of another model: this {kind} has no {missing[0]}, and {len(missing)} of the "
            f"file's {len(lora)} layers have no place ({', '.join(missing[:NAMED])}). Nothing was loaded. Its layers "
            f"are those of {', '.join(lora.parts)}; this is a {type(pipeline).__name__}."
        )
    if not places:
        raise UsageError(f"{lora.source} holds no LoRA. Name a file that one was saved in")
    return places


def _fitted(layer: Layer, module: Any, name: str, source: str) -> Layer:
    """Return the layer with as many dimensions as the module's weight. UsageError where its sizes differ."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    if isinstance(base, nn.Conv2d):
        sizes = (base.in_channels // base.groups, *base.kernel_size), (base.out_channels, 1, 1)
    else:
        sizes = (base.in_features,), (base.out_features,)
    inner, outer = sizes
    # a 1 x 1 convolution and a linear layer hold the same numbers
    down = layer.down.reshape(layer.rank, *_as(layer.down.shape[1:], inner))
    up = (
        layer.up.reshape(*_as((layer.up.shape[0],), outer[:1]), layer.rank, *outer[1:])
        if (layer.up[0].numel() == layer.rank)
        else layer.up
    )
    for features, expected in ((down.shape[1], inner[0]), (up.shape[0], outer[0])):
        if features != expected:
            raise UsageError(
                f"{source} is a LoRA of another model: {name} has {features} features there, {expected} here. "
                "Load it into the model that it was trained on"
            )
    if down.shape[1:] != inner or up.shape[2:] != outer[1:]:
        raise UsageError(
            f"{source} is a LoRA of another model: the kernel of {name} is {tuple(down.shape[2:])} there, "
            f"{inner[1:]} here. Load it into the model that it was trained on"
        )
    magnitude = layer.magnitude
    if magnitude is not None and magnitude.numel() != outer[0]:
        raise UsageError(
            f"{source}: {name} has {magnitude.numel()} magnitudes for {outer[0]} outputs. Save it again"
        )
    return Layer(down, up, layer.alpha, magnitude)


def _as(shape: Any, like: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with trailing ones added or left out, as `like` has them."""
    trailing = tuple(shape)
    if len(trailing) < len(like):
        return (*trailing, *[1] * (len(like) - len(trailing)))
    if set(trailing[len(like) :]) <= {1}:
        return trailing[: len(like)]
    return trailing


def _install(component: nn.Module, layers: Mapping[str, Layer], adapter: str) -> None:
    """Add one component's layers as an adapter, and check that all of them are there."""
    dora = [layer.magnitude is not None for layer in layers.values()]
    if any(dora) and not all(dora):
        raise UsageError(
            "a LoRA of which some layers are DoRA and others are not can only be merged. Use `diffalign merge`"
        )
    config = PeftLoraConfig(**formats.adapter_config(layers), use_dora=any(dora))
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"] = layer.down
        state[f"{name}.lora_B.weight"] = layer.up
        if layer.magnitude is not None:
            state[f"{name}.lora_magnitude_vector"] = layer.magnitude
    inject_adapter_in_model(config, component, adapter_name=adapter, state_dict=state)
    result = set_peft_model_state_dict(component, state, adapter_name=adapter)
    component._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers and transformers ask for it
    modules = dict(component.named_modules())
    absent = [n for n in layers if adapter not in getattr(modules[n], "lora_A", {})]
    if absent or result.unexpected_keys:
        names = ", ".join((absent or result.unexpected_keys)[:NAMED])
        raise UsageError(
            f"{len(absent) or len(result.unexpected_keys)} layers of the LoRA cannot carry an adapter in this "
            f"{type(component).__name__}: {names}"
        )


def _part(pipeline: Any) -> str:
    """Return what a pipeline calls its denoiser."""
    return UNET if getattr(pipeline, UNET, None) is not None else TRANSFORMER
