"""LoRA files of other programs: kohya's sd-scripts and ComfyUI, from and to diffusers' keys.

diffusers names its own modules: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. ComfyUI reads those names,
with alpha as a tensor beside them. kohya names the modules of the original release, where queries, keys and values are
one matrix: several LoRAs of rank r become one of rank n r, block-diagonal, with alpha n alpha, the same update. Of
U-Nets (SD1.5, SDXL) kohya's names are diffusers' own with other dots; files of SDXL may have the release's, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.core.errors import UsageError

FORMATS = ("diffusers", "comfyui", "kohya")
METADATA = "lora_adapter_metadata"
TRANSFORMER, UNET = "transformer", "unet"
KOHYA = "lora_unet_"
"""Before every name of kohya's, transformers' as well."""

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
# A U-Net's modules: kohya has "_" for every dot, so the words say which of them are dots.
UNET_KEY = re.compile(rf"{KOHYA}(down|mid|up|input|middle|output)_blocks?_")
UNET_WORDS = re.compile(
    r"(?:down|up|transformer)_blocks|mid_block|resnets|attentions|(?:down|up)samplers|attn[12]|to_[qkv]|to_out|ff|net|"
    r"time_emb_proj|proj_in|proj_out|proj|conv_shortcut|conv_in|conv_out|conv[12]?|(?:time|add)_embedding|linear_[12]|\d+"
)
# The release's names of SDXL, which sd-scripts trains under, to diffusers'.
UNET_WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
UNET_INNER = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}


class Lora:
    """The matrices of a LoRA by diffusers' module names: `down` (r, in), `up` (out, r), `alpha`; those of convolutions
    have a kernel behind. `part` is what a pipeline calls the model: transformer or unet."""

    def __init__(self, part: str = TRANSFORMER) -> None:
        self.part = part
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
    if any(key.startswith(KOHYA) for key in tensors):
        return _read_kohya(tensors, path)
    return _read_diffusers(tensors, metadata, path)


def write(lora: Lora, path: Path, *, to: str, family: str | None = None) -> None:
    """Write a LoRA; `family` ("sd3" or "flux") for kohya's names of a transformer. UsageError for a module without a
    name there, before anything is made."""
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; valid are {', '.join(FORMATS)}")
    if to == "comfyui" and lora.part == UNET:
        raise UsageError("ComfyUI reads LoRAs of U-Nets (SD1.5, SDXL) in kohya's keys: --to kohya")
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
    part = UNET if any(key.startswith(f"{UNET}.") for key in tensors) else TRANSFORMER
    ends = (".lora_A.weight", ".lora_B.weight", ".alpha")
    if not any(key.endswith(ends[0]) for key in tensors):
        raise UsageError(
            f"{path} holds no LoRA of a transformer or a U-Net in diffusers' or kohya's keys"
        )
    _check_keys(tensors, path, prefix=f"{part}.", ends=ends)
    config = json.loads(metadata.get(METADATA, "{}"))
    config = {key.removeprefix(f"{part}."): value for key, value in config.items()}
    alpha, alphas = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    lora = Lora(part)
    for name, down, up in _pairs(tensors, path, down=ends[0], up=ends[1]):
        module = name.removeprefix(f"{part}.")
        own = tensors.get(f"{name}.alpha")
        value = alphas.get(module, down.shape[0] if alpha is None else alpha)
        lora.add(module, down, up, float(value if own is None else own.item()))
    return lora


def _check_keys(
    tensors: Mapping[str, Tensor], path: Path, *, prefix: str, ends: tuple[str, ...]
) -> None:
    """UsageError for a tensor that would be lost: of a text encoder, of another model, of DoRA or LoHa."""
    for key in tensors:
        if not (key.startswith(prefix) and key.endswith(ends)):
            raise UsageError(
                f"{path} holds {key}: what is converted is a plain LoRA of one transformer or U-Net, here with keys "
                f"{prefix}...{', '.join(ends)}"
            )


def _pairs(
    tensors: Mapping[str, Tensor], path: Path, *, down: str, up: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and both matrices of every layer; UsageError where one is missing."""
    for name in dict.fromkeys(
        k.removesuffix(e) for k in tensors for e in (down, up) if k.endswith(e)
    ):
        for end in (down, up):
            if f"{name}{end}" not in tensors:
                raise UsageError(f"{path}: {name} has no {end.removesuffix('.weight').lstrip('.')}")
        yield name, tensors[f"{name}{down}"], tensors[f"{name}{up}"]


def _diffusers(lora: Lora) -> dict[str, Tensor]:
    downs = {f"{lora.part}.{name}.lora_A.weight": down for name, down in lora.down.items()}
    return downs | {f"{lora.part}.{name}.lora_B.weight": up for name, up in lora.up.items()}


def _alphas(lora: Lora) -> dict[str, Tensor]:
    return {f"{lora.part}.{name}.alpha": torch.tensor(alpha) for name, alpha in lora.alpha.items()}


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
    return json.dumps({f"{lora.part}.{k}": v for k, v in config.items()}, sort_keys=True)


def _most(values: Iterable[float]) -> float:
    found = list(values)
    return max(set(found), key=found.count)


def _kohya(lora: Lora, family: str | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def add(name: str, down: Tensor, up: Tensor, alpha: float) -> None:
        tensors[f"{KOHYA}{name}.lora_down.weight"] = down
        tensors[f"{KOHYA}{name}.lora_up.weight"] = up
        tensors[f"{KOHYA}{name}.alpha"] = torch.tensor(alpha)

    if lora.part == UNET:
        if family is not None:
            raise UsageError(
                f"--family is for transformers, and this is the LoRA of a U-Net: no {family!r}"
            )
        for module, down in lora.down.items():
            add(module.replace(".", "_"), down, lora.up[module], lora.alpha[module])
        return tensors
    if family not in TABLES:
        raise UsageError(f"kohya's keys depend on the family: sd3 or flux, not {family!r}")
    left = set(lora.down)
    for pattern, parts in TABLES[family].items():
        for number in sorted({n for part in parts for n in _numbers(part, left)}):
            names = [part.format(number) for part in parts]
            down, up, alpha = _stack(lora, names)
            add(pattern.format(number), down, _swap(names[0], down, up), alpha)
            left -= set(names)
    if left:
        raise UsageError(
            f"kohya's keys for {family} have no name for {', '.join(sorted(left)[:3])}"
        )
    return tensors


def _read_kohya(tensors: Mapping[str, Tensor], path: Path) -> Lora:
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    _check_keys(tensors, path, prefix=KOHYA, ends=ends)
    found = {k: (a, b) for k, a, b in _pairs(tensors, path, down=ends[0], up=ends[1])}
    alphas = {k: float(tensors.get(f"{k}.alpha", a.shape[0])) for k, (a, _) in found.items()}
    left = set(found)
    if any(UNET_KEY.match(key) for key in left):
        lora = Lora(UNET)
        for key, (down, up) in found.items():
            if (module := _unet_module(key.removeprefix(KOHYA))) is not None:
                lora.add(module, down, up, alphas[key])
                left.discard(key)
    else:
        lora = Lora()
        for table in TABLES.values():
            for pattern, parts in table.items():
                for number in _numbers(f"{KOHYA}{pattern}", left):
                    key = f"{KOHYA}{pattern}".format(number)
                    down, up = found[key]
                    names = [part.format(number) for part in parts]
                    _unstack(lora, names, down, _swap(names[0], down, up), alphas[key])
                    left.discard(key)
    if left:
        raise UsageError(
            f"{path}: no module of SD1.5, SDXL, SD3 or FLUX is known as {sorted(left)[0]}"
        )
    return lora


def _unet_module(name: str) -> str | None:
    """diffusers' name of a U-Net's module from kohya's; None where it is none."""
    name = _of_release(name)
    words = UNET_WORDS.findall(name)
    return ".".join(words) if "_".join(words) == name else None


def _of_release(name: str) -> str:
    """diffusers' name, still with "_" for dots, of a module that is named as in SDXL's release; others as they are.
    A release's block is one layer of diffusers' blocks, of which each has three (two of them and a sampler down)."""
    if name in UNET_WHOLE:
        return UNET_WHOLE[name]
    if middle := re.fullmatch(r"middle_block_([012])_(.+)", name):
        place = ("resnets_0", "attentions_0", "resnets_1")[int(middle[1])]
        return f"mid_block_{place}_{UNET_INNER.get(middle[2], middle[2])}"
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", name)
    if found is None:
        return name
    down, inner = found[1] == "input", UNET_INNER.get(found[4], found[4])
    block, layer = divmod(int(found[2]) - down, 3)
    side = "down" if down else "up"
    if inner == "conv":
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    return f"{side}_blocks_{block}_{'attentions' if found[3] == '1' else 'resnets'}_{layer}_{inner}"


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
