"""LoRA files of every program: what their tensors mean, and the keys of diffusers, ComfyUI and kohya to write them in.

diffusers names its own modules: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. ComfyUI reads those names,
with alpha as a tensor beside them. kohya names the modules of the original release, where queries, keys and values are
one matrix (`lora.stacks`). Of U-Nets (SD1.5, SDXL) kohya's names are diffusers' own with other dots. `lora.names` reads
all of these spellings, and those of PEFT, OneTrainer, ai-toolkit, SimpleTuner, XLabs and the releases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.lora import configuration, names, stacks
from diffalign.lora.configuration import METADATA
from diffalign.lora.layer import Layer
from diffalign.lora.names import KOHYA, TRANSFORMER, UNET

FORMATS = ("diffusers", "comfyui", "kohya")


@dataclass
class Lora:
    """Layers of a LoRA: component of the pipeline ("transformer", "unet", "text_encoder", ...) -> module -> layer.

    `dtype` is what the file stores; `source` names the file in errors.
    """

    parts: dict[str, dict[str, Layer]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    source: str = "LoRA"

    def add(self, part: str, module: str, layer: Layer) -> None:
        """Add one layer. UsageError where the module has one already, under another spelling of its name."""
        layers = self.parts.setdefault(part, {})
        if module in layers:
            raise UsageError(
                f"{self.source} holds {part}.{module} twice, under two spellings of its name. Remove one of them."
            )
        layers[module] = layer

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))


def read(path: Path, config: Mapping[str, Any] | None = None, *, unclear: str = "") -> Lora:
    """Read a LoRA file in any of the formats.

    Args:
        path: a .safetensors file.
        config: the `adapter_config.json` beside it, as PEFT writes it.
        unclear: the error for a layer whose alpha neither the file nor `config` gives; "" where it is then the rank.

    Raises:
        UsageError: it is none, or holds a tensor that is no part of a plain LoRA or of PEFT's DoRA, or not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} is no readable safetensors file: {error}. Save or download it again"
        ) from error
    configs = configuration.header_configs(header, path)
    if not configs and config is not None:
        configs = {"": configuration.checked(config, path)}
    grouped = _grouped(tensors, path)
    lora = Lora(source=str(path), dtype=_stored_dtype(tensors))
    shapes = {m: (own["down"].shape[1], own["up"].shape[0]) for m, own in grouped.items()}
    released = names.released_by(shapes)
    for module, own in grouped.items():
        place = names.find_place(module, released)
        if place is None:
            raise UsageError(
                f"{path} holds {module}, by which no module of a family of `diffalign list models` is known. "
                "Convert it with the program that made it"
            )
        own_config = configs.get(place.part, configs.get("", {}))
        if own_config.get("use_dora") and "magnitude" not in own:
            raise UsageError(
                f"{path}: use_dora=true, and {module} has no lora_magnitude_vector, so the file is not complete. Save "
                "it again, with PEFT's save_pretrained."
            )
        alpha = _alpha(own, place, own_config, unclear)
        for name, layer in stacks.split(place, own["down"], own["up"], alpha):
            if "magnitude" in own and len(place.modules) > 1:
                raise UsageError(f"{path}: DoRA of {module}, which is several modules in diffusers")
            magnitude = own.get("magnitude")
            lora.add(
                place.part, name, Layer(*layer, None if magnitude is None else magnitude.flatten())
            )
    return lora


def _grouped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Return module -> kind -> tensor in float32. UsageError for whatever is left or cannot be one."""
    parsed = {key: names.split_key(key) for key in tensors}
    if not any(parsed.values()):
        example = (
            f", for instance {next(iter(tensors))} ({_kind_of(next(iter(tensors)))})"
            if tensors
            else ""
        )
        raise UsageError(
            f"{path} holds no LoRA: none of its {len(tensors)} tensors is a part of one{example}"
        )
    _check_adapters(parsed, path)
    grouped: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    for key, tensor in tensors.items():
        place = parsed[key]
        if place is None:
            raise UsageError(
                f"{path} holds {key}, and only plain LoRA and PEFT's DoRA are read: {_kind_of(key)}. Nothing was "
                "loaded. Merge it with the program that made it, or export it as a plain LoRA."
            )
        module, kind = place.module, place.kind
        if not tensor.is_floating_point() and kind != "alpha":
            raise UsageError(
                f"{path}: {key} holds {tensor.dtype}, and a LoRA's matrices are floats. Save it in a "
                "floating-point format"
            )
        value = tensor.float()
        if not value.isfinite().all():
            raise UsageError(
                f"{path}: {key} is not finite (NaN or infinity), so the file is damaged or its training diverged. Take "
                "an earlier checkpoint."
            )
        other = keys.setdefault((module, kind), key)
        if other != key:
            raise UsageError(
                f"{path} holds {other} and {key}, two tensors for one place. Save one LoRA per file."
            )
        grouped.setdefault(module, {})[kind] = value
    for module, own in grouped.items():
        _check_layer(module, own, path)
    return grouped


def _check_layer(module: str, own: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a layer that has not all matrices, or whose matrices do not belong together."""
    for kind, other in (("down", "lora_A"), ("up", "lora_B")):
        if kind not in own:
            spelling = f"lora_{kind}" if module.startswith("lora_") else other
            raise UsageError(f"{path}: {module} has no {spelling}")
    if "alpha" in own and own["alpha"].numel() != 1:
        raise UsageError(
            f"{path}: alpha of {module} is {own['alpha'].numel()} numbers, not one. Save it again"
        )
    if "alpha" in own:
        configuration.check_alpha(own["alpha"].item(), f"{module}.alpha", path)
    if own["down"].shape[:1] == (0,):
        raise UsageError(f"{path}: {module} has rank 0. Save it again without that layer")
    if own["up"].ndim < 2 or own["down"].ndim < 2 or own["up"].shape[1] != own["down"].shape[0]:
        shapes = f"{tuple(own['down'].shape)} and {tuple(own['up'].shape)}"
        raise UsageError(
            f"{path}: the matrices of {module}, {shapes}, have no rank in common. Save it again"
        )


def _check_adapters(keys: Mapping[str, names.Key | None], path: Path) -> None:
    """Refuse a file that holds several of PEFT's adapters, with a key of each."""
    examples: dict[str, str] = {}
    for key, parsed in keys.items():
        # alpha has no adapter's name, and neither has a magnitude that PEFT saved
        if parsed is not None and (parsed.adapter or parsed.kind in ("down", "up")):
            examples.setdefault(parsed.adapter, key)
    if len(examples) > 1:
        adapters = ", ".join(repr(name) if name else "one without a name" for name in examples)
        raise UsageError(
            f"{path} holds {len(examples)} adapters ({adapters}), for instance {' and '.join(examples.values())}. Save "
            "each adapter in a file of its own, as PEFT's save_pretrained does."
        )


def _kind_of(key: str) -> str:
    for word, kind in {
        "dora_scale": "this is a DoRA of LyCORIS, whose scale programs apply in different ways",
        "hada_": "this is a LoHa of LyCORIS",
        "lokr_": "this is a LoKr of LyCORIS",
        "lora_mid": "this is a LoCon with a third matrix",
        ".diff": "this is a difference of whole weights",
        "_norm": "this is a normalisation layer",
        ".bias": "this is a bias, which PEFT trains with lora_bias=True or bias=...",
    }.items():
        if word in key:
            return kind
    return "this is neither"


def _stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype to write in: the file's own where it has two bytes, else float32."""
    dtypes = {t.dtype for k, t in tensors.items() if t.ndim > 1}
    one = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    return one if one in (torch.float16, torch.bfloat16) else torch.float32


def _alpha(
    own: Mapping[str, Tensor], place: names.Place, config: Mapping[str, Any], unclear: str
) -> float:
    """Return alpha from the tensor, else from the configuration, else the rank."""
    if "alpha" in own:
        return float(own["alpha"].flatten()[0])
    rank = own["down"].shape[0]
    alpha = configuration.alpha_of(config, place.modules[0], rank)
    if alpha is None and unclear:
        raise UsageError(unclear)
    return float(rank) if alpha is None else alpha


def write(lora: Lora, path: Path, *, to: str, family: str | None = None) -> None:
    """Write a LoRA.

    Args:
        to: "diffusers", "comfyui" or "kohya".
        family: one of `names.TABLES` or `names.FLAT`, for kohya's names of a transformer.

    Raises:
        UsageError: the format has no name for a module, or no DoRA; nothing is written.
    """
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; valid are {', '.join(FORMATS)}")
    for part, module, layer in _every(lora):
        if layer.magnitude is not None:
            raise UsageError(
                f"{lora.source} is a DoRA ({part}.{module} has a lora_magnitude_vector): {to}'s keys are written for "
                "plain LoRA only. `diffalign merge` reads it."
            )
    if to == "comfyui" and UNET in lora.parts:
        raise UsageError(
            "ComfyUI reads LoRAs of U-Nets (SD1.5, SDXL) in kohya's keys: convert to kohya"
        )
    if to == "diffusers":
        tensors, metadata = _diffusers(lora), {METADATA: _adapter_metadata(lora)}
    else:  # diffusers refuses a file that has both tensors of alpha and its own metadata
        tensors = _kohya(lora, family) if to == "kohya" else _diffusers(lora) | _alphas(lora)
        every = [layer for *_, layer in _every(lora)]
        metadata = {
            "ss_network_dim": str(mode(layer.rank for layer in every)),
            "ss_network_alpha": str(mode(layer.alpha for layer in every)),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        k: (v if k.endswith(".alpha") else v.to(lora.dtype)).contiguous()
        for k, v in tensors.items()
    }
    save_file(stored, path, {"format": "pt", **metadata})


def _every(lora: Lora) -> list[tuple[str, str, Layer]]:
    return [(p, m, layer) for p, layers in lora.parts.items() for m, layer in layers.items()]


def _diffusers(lora: Lora) -> dict[str, Tensor]:
    downs = {f"{part}.{name}.lora_A.weight": layer.down for part, name, layer in _every(lora)}
    return downs | {f"{part}.{name}.lora_B.weight": layer.up for part, name, layer in _every(lora)}


def _alphas(lora: Lora) -> dict[str, Tensor]:
    return {f"{part}.{name}.alpha": torch.tensor(layer.alpha) for part, name, layer in _every(lora)}


def adapter_config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Return the arguments of PEFT's configuration for one component's layers."""
    rank = mode(layer.rank for layer in layers.values())
    alpha = mode(layer.alpha for layer in layers.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        # PEFT takes patterns for endings of names: "^" makes each that of one whole name
        "rank_pattern": {f"^{n}": x.rank for n, x in layers.items() if x.rank != rank},
        "alpha_pattern": {f"^{n}": x.alpha for n, x in layers.items() if x.alpha != alpha},
        "target_modules": sorted(layers),
    }


def _adapter_metadata(lora: Lora) -> str:
    """Return diffusers' header: the configuration with which peft builds the adapters."""
    config = {
        f"{part}.{key}": value
        for part, layers in lora.parts.items()
        for key, value in {**adapter_config(layers), "peft_type": "LORA"}.items()
    }
    return json.dumps(config, sort_keys=True)


def _kohya(lora: Lora, family: str | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def add(name: str, layer: Layer) -> None:
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)

    for part, layers in lora.parts.items():
        if part == TRANSFORMER:
            table = names.TABLES.get(_known_family(family))
            if table is None:
                for module, layer in layers.items():
                    add(KOHYA + module.replace(".", "_"), layer)
                continue
            for name, matrices in stacks.join(layers, table, family=str(family)):
                add(f"{KOHYA}{name}", Layer(*matrices))
            continue
        if part == UNET and family is not None:
            raise UsageError(
                f"family={family!r} is for transformers, and this is the LoRA of a U-Net. Leave it out."
            )
        prefix = KOHYA if part == UNET else names.kohya_text_prefix(part, list(lora.parts))
        for module, layer in layers.items():
            add(prefix + module.replace(".", "_"), layer)
    return tensors


def _known_family(family: str | None) -> str:
    """Return the family. UsageError if kohya's keys have no table for it."""
    if family is None or family not in (*names.TABLES, *names.FLAT):
        families = ", ".join(sorted((*names.TABLES, *names.FLAT)))
        raise UsageError(f"kohya's keys depend on the family: one of {families}, not {family!r}")
    return family
