"""LoRA files of other programs: kohya's sd-scripts and ComfyUI, from and to diffusers' keys.

diffusers names its own modules: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. ComfyUI reads those names,
with alpha as a tensor beside them. kohya names the modules of the original release, where queries, keys and values are
one matrix: several LoRAs of rank r become one of rank n r, block-diagonal, with alpha n alpha, the same update.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import UsageError

FORMATS = ("diffusers", "comfyui", "kohya")
METADATA = "lora_adapter_metadata"
PREFIX = "transformer."

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
# kohya's module -> diffusers' modules whose outputs it stacks; {} is the number of the block
FLUX = {
    "double_blocks_{}_img_attn_qkv": [f"transformer_blocks.{{}}.attn.{n}" for n in QKV],
    "double_blocks_{}_txt_attn_qkv": [f"transformer_blocks.{{}}.attn.{n}" for n in ADDED_QKV],
    "double_blocks_{}_img_attn_proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks_{}_txt_attn_proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks_{}_img_mlp_0": ["transformer_blocks.{}.ff.net.0.proj"],
    "double_blocks_{}_img_mlp_2": ["transformer_blocks.{}.ff.net.2"],
    "double_blocks_{}_txt_mlp_0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks_{}_txt_mlp_2": ["transformer_blocks.{}.ff_context.net.2"],
    "double_blocks_{}_img_mod_lin": ["transformer_blocks.{}.norm1.linear"],
    "double_blocks_{}_txt_mod_lin": ["transformer_blocks.{}.norm1_context.linear"],
    "single_blocks_{}_linear1": [
        *(f"single_transformer_blocks.{{}}.attn.{n}" for n in QKV),
        "single_transformer_blocks.{}.proj_mlp",
    ],
    "single_blocks_{}_linear2": ["single_transformer_blocks.{}.proj_out"],
    "single_blocks_{}_modulation_lin": ["single_transformer_blocks.{}.norm.linear"],
}
SD3 = {
    "joint_blocks_{}_x_block_attn_qkv": [f"transformer_blocks.{{}}.attn.{n}" for n in QKV],
    "joint_blocks_{}_x_block_attn2_qkv": [f"transformer_blocks.{{}}.attn2.{n}" for n in QKV],
    "joint_blocks_{}_context_block_attn_qkv": [
        f"transformer_blocks.{{}}.attn.{n}" for n in ADDED_QKV
    ],
    "joint_blocks_{}_x_block_attn_proj": ["transformer_blocks.{}.attn.to_out.0"],
    "joint_blocks_{}_x_block_attn2_proj": ["transformer_blocks.{}.attn2.to_out.0"],
    "joint_blocks_{}_context_block_attn_proj": ["transformer_blocks.{}.attn.to_add_out"],
    "joint_blocks_{}_x_block_mlp_fc1": ["transformer_blocks.{}.ff.net.0.proj"],
    "joint_blocks_{}_x_block_mlp_fc2": ["transformer_blocks.{}.ff.net.2"],
    "joint_blocks_{}_context_block_mlp_fc1": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "joint_blocks_{}_context_block_mlp_fc2": ["transformer_blocks.{}.ff_context.net.2"],
    "joint_blocks_{}_x_block_adaLN_modulation_1": ["transformer_blocks.{}.norm1.linear"],
    "joint_blocks_{}_context_block_adaLN_modulation_1": [
        "transformer_blocks.{}.norm1_context.linear"
    ],
}
TABLES = {"flux": FLUX, "sd3": SD3}
MLP_RATIO = 4


class Lora:
    """The matrices of a LoRA by diffusers' module names: `down` (r, in), `up` (out, r), `alpha`."""

    def __init__(self) -> None:
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        self.alpha: dict[str, float] = {}

    def add(self, module: str, down: Tensor, up: Tensor, alpha: float) -> None:
        self.down[module], self.up[module], self.alpha[module] = down, up, alpha


def read(path: Path) -> Lora:
    """A LoRA file in any of the formats; UsageError where it is none, or holds what cannot be named."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is no readable safetensors file: {error}") from error
    if any(key.startswith("lora_unet_") for key in tensors):
        return _read_kohya(tensors, path)
    return _read_diffusers(tensors, metadata, path)


def write(lora: Lora, path: Path, *, to: str, family: str | None = None) -> None:
    """Write a LoRA; `family` ("sd3" or "flux") for kohya's names. UsageError for a module without a name there."""
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; valid are {', '.join(FORMATS)}")
    if to == "diffusers":
        tensors, metadata = _diffusers(lora), {METADATA: _adapter_metadata(lora)}
    else:  # diffusers refuses a file that has both tensors of alpha and its own metadata
        tensors = _kohya(lora, family) if to == "kohya" else _diffusers(lora) | _alphas(lora)
        rank = _most(down.shape[0] for down in lora.down.values())
        metadata = {
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(_most(lora.alpha.values())),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt", **metadata})


def _read_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Lora:
    config = json.loads(metadata.get(METADATA, "{}"))
    config = {key.removeprefix(PREFIX): value for key, value in config.items()}
    alpha, alphas = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    lora = Lora()
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            module = name.removeprefix(PREFIX)
            own = tensors.get(f"{name}.alpha")
            value = alphas.get(module, down.shape[0] if alpha is None else alpha)
            value = value if own is None else own.item()
            up = tensors.get(f"{name}.lora_B.weight")
            if up is None:
                raise UsageError(f"{path}: {key} has no lora_B")
            lora.add(module, down, up, float(value))
    if not lora.down:
        raise UsageError(f"{path} holds no LoRA of a transformer in diffusers' or kohya's keys")
    return lora


def _diffusers(lora: Lora) -> dict[str, Tensor]:
    downs = {f"{PREFIX}{name}.lora_A.weight": down for name, down in lora.down.items()}
    return downs | {f"{PREFIX}{name}.lora_B.weight": up for name, up in lora.up.items()}


def _alphas(lora: Lora) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}.alpha": torch.tensor(alpha) for name, alpha in lora.alpha.items()}


def _adapter_metadata(lora: Lora) -> str:
    """What peft needs to build the adapter, in the header of diffusers' files."""
    ranks = {name: down.shape[0] for name, down in lora.down.items()}
    rank, alpha = _most(ranks.values()), _most(lora.alpha.values())
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in lora.alpha.items() if a != alpha},
        "target_modules": sorted(lora.down),
        "peft_type": "LORA",
    }
    return json.dumps({f"{PREFIX}{k}": v for k, v in config.items()}, sort_keys=True)


def _most(values: Iterable[float]) -> float:
    found = list(values)
    return max(set(found), key=found.count)


def _kohya(lora: Lora, family: str | None) -> dict[str, Tensor]:
    if family not in TABLES:
        raise UsageError(f"kohya's keys depend on the family: sd3 or flux, not {family!r}")
    left = set(lora.down)
    tensors: dict[str, Tensor] = {}
    for pattern, parts in TABLES[family].items():
        for number in sorted({n for part in parts for n in _numbers(part, left)}):
            names = [part.format(number) for part in parts]
            down, up, alpha = _stack(lora, names)
            key = f"lora_unet_{pattern.format(number)}"
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = _swap(names[0], down, up)
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            left -= set(names)
    if left:
        raise UsageError(
            f"kohya's keys for {family} have no name for {', '.join(sorted(left)[:3])}"
        )
    return tensors


def _read_kohya(tensors: Mapping[str, Tensor], path: Path) -> Lora:
    left = {k.rpartition(".lora_down")[0] for k in tensors if k.endswith(".lora_down.weight")}
    lora = Lora()
    for table in TABLES.values():
        for pattern, parts in table.items():
            for number in _numbers(f"lora_unet_{pattern}", left):
                key = f"lora_unet_{pattern}".format(number)
                down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
                alpha = tensors.get(f"{key}.alpha", torch.tensor(float(down.shape[0]))).item()
                names = [part.format(number) for part in parts]
                _unstack(lora, names, down, _swap(names[0], down, up), alpha)
                left.discard(key)
    if left:
        raise UsageError(f"{path}: no module of SD3 or FLUX is known as {sorted(left)[0]}")
    return lora


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    """Block numbers with which a name of the pattern occurs."""
    expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    return sorted(int(m[1]) for name in names if (m := expression.fullmatch(name)))


def _width(name: str, features: int) -> int:
    """Outputs of one of several stacked modules, from its inputs."""
    return MLP_RATIO * features if name.endswith("proj_mlp") else features


def _stack(lora: Lora, names: list[str]) -> tuple[Tensor, Tensor, float]:
    """One LoRA for stacked modules: block-diagonal, zero for modules without one, all with the scale of the first."""
    present = [n for n in names if n in lora.down]
    first = lora.down[present[0]]
    if len(names) == 1:
        return first, lora.up[names[0]], lora.alpha[names[0]]
    rank, features = first.shape
    scale = lora.alpha[present[0]] / rank
    downs, ups = [], []
    for name in names:
        if name in lora.down:
            down, own = lora.down[name], lora.alpha[name] / lora.down[name].shape[0]
            downs.append(down)
            ups.append(lora.up[name] * (own / scale))
        else:
            downs.append(first.new_zeros(rank, features))
            ups.append(first.new_zeros(_width(name, features), rank))
    down = torch.cat(downs)
    return down, torch.block_diag(*ups), scale * down.shape[0]


def _unstack(lora: Lora, names: list[str], down: Tensor, up: Tensor, alpha: float) -> None:
    """The inverse of `_stack`; a LoRA that is not block-diagonal shares its `down` among the modules."""
    if len(names) == 1:
        lora.add(names[0], down, up, alpha)
        return
    total, features = down.shape
    ups = up.split([_width(n, features) for n in names])
    rank = total // len(names)
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(names))]
    diagonal = total % len(names) == 0 and torch.equal(
        up, torch.block_diag(*(u[:, b] for u, b in zip(ups, blocks, strict=True)))
    )
    for name, part, block in zip(names, ups, blocks, strict=True):
        if not diagonal:
            lora.add(name, down, part, alpha)
        elif part[:, block].any() or down[block].any():
            lora.add(name, down[block], part[:, block], alpha * rank / total)


def _swap(name: str, down: Tensor, up: Tensor) -> Tensor:
    """The context modulation of SD3's last block holds scale and shift only, in diffusers in the other order."""
    if name.endswith("norm1_context.linear") and up.shape[0] == 2 * down.shape[1]:
        return torch.cat(up.chunk(2)[::-1])
    return up
