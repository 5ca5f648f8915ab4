"""Read and write LoRA files of stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from peft import get_peft_model_state_dict
from torch import nn

from diffalign.core.errors import UsageError
from diffalign.lora.policies import CURRENT

WEIGHT_NAME = "pytorch_lora_weights.safetensors"


def export_lora(denoiser: ModelMixin, pipeline: Any, folder: Path, *, name: str = CURRENT) -> Path:
    """Save an adapter so that stock `load_lora_weights(folder)` restores it, rank and alpha included."""
    state = get_peft_model_state_dict(denoiser, adapter_name=name)
    state = {key: value.detach().float().contiguous().cpu() for key, value in state.items()}
    metadata = denoiser.peft_config[name].to_dict()
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
    folder.mkdir(parents=True, exist_ok=True)
    part = _part(pipeline)
    layers = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **layers)
    return folder / WEIGHT_NAME


def load_lora(pipeline: Any, source: str) -> None:
    """Stock `load_lora_weights`, after a look at whether the file is for this model: diffusers drops what has no place
    and warns, or raises pages of shapes.

    Args:
        source: a folder, a file or a hub id; behind a colon the file in it, "wangfuyun/PCM_Weights:sd15/FILE".

    Raises:
        UsageError: nothing is there, or it names a layer that the denoiser lacks or has in another size.
    """
    place, where = _place(source)
    unet = {"unet_config": pipeline.unet.config} if _part(pipeline) == "unet" else {}
    try:
        state = pipeline.lora_state_dict(place, **where, **unet)
    except (OSError, ValueError) as error:
        raise UsageError(f"{source} could not be read as a LoRA: {error}") from error
    state = state[0] if isinstance(state, tuple) else state
    denoiser = getattr(pipeline, _part(pipeline))
    modules = dict(denoiser.named_modules())
    prefix = f"{_part(pipeline)}."
    pairs = {
        k
        for k in state
        if k.startswith(prefix) and k.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    kind = type(denoiser).__name__
    if unet and not pairs and any("lora" in k for k in state):
        return _load_lora(
            pipeline, place, where
        )  # of kohya or an older diffusers, which it reads itself
    if not pairs:
        raise UsageError(
            f"{source} holds no LoRA for a {kind} in diffusers' keys; `diffalign convert` reads kohya's and ComfyUI's"
        )
    for key in sorted(pairs):
        name, part = key.removeprefix(prefix).removesuffix(".weight").rsplit(".", 1)
        layer = modules.get(name)
        if layer is None:
            raise UsageError(f"{source} is a LoRA of another model: this {kind} has no {name}")
        side = 1 if part == "lora_A" else 0
        here = (
            (layer.out_features, layer.in_features)[side] if isinstance(layer, nn.Linear) else None
        )
        if here is not None and state[key].shape[side] != here:
            raise UsageError(
                f"{source} is a LoRA of another model: {name} has {state[key].shape[side]} features there, {here} here"
            )
    return _load_lora(pipeline, place, where)


def _place(source: str) -> tuple[str, dict[str, str]]:
    """Folder or hub id, and what diffusers takes to find the file in it."""
    if Path(source).exists() or ":" not in source:
        return source, {}
    place, _, file = source.rpartition(":")
    subfolder, _, name = file.rpartition("/")
    return place, {"weight_name": name, **({"subfolder": subfolder} if subfolder else {})}


def _load_lora(pipeline: Any, source: str, where: dict[str, str]) -> None:
    try:
        pipeline.load_lora_weights(source, **where)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"{source} could not be loaded by diffusers: {error}") from error


def _part(pipeline: Any) -> str:
    """What a pipeline calls its denoiser."""
    return "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
