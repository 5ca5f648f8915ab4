"""Export of 4-bit denoisers in the layout that diffusers loads as SVDQuant (`nunchaku_lite`).

A layer is y = Q(x) W + (x D) U + b with weights W of 4 bits, a branch (D, U) in 16 bits, and inputs that the kernel
rounds to 4 bits (Li et al. 2024, SVDQuant). The kernels read tensors in the order of the matrix units' registers (PTX,
mma.m16n8k64): a thread's values lie together. Weights are integers in groups of 64, or `nvfp4`: numbers of 4 bits
(E2M1) in groups of 16, with scales of 8 bits and one scale for the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core.errors import UsageError
from diffalign.core.files import write_text
from diffalign.quantization import codes
from diffalign.quantization.layers import PackedLayer, PackedLinear
from diffalign.quantization.lowrank import truncated_svd

GROUPS = {"int4": 64, "nvfp4": 16}
"""Weights that share a scale, by precision."""
TILE = 128
"""Divisor of a layer's inputs and outputs."""
RANK = 16
"""Divisor of a branch's rank."""
DENSE = ("*norm*", "*embed*", "proj_out", "*adaln*")
"""Layers that keep 16 bits: their inputs are few and vary too much for 4 bits."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Sizes of the numbers of 4 bits; the highest bit is the sign."""
E4M3 = 448.0
"""Largest scale of 8 bits."""


@dataclass(frozen=True)
class Export:
    """Exported denoiser: the layers in 4 bits, and those in 16 bits that were packed before."""

    targets: tuple[str, ...]
    dense: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.targets)} layers in 4 bits, and {len(self.dense)} packed layers back in 16 bits"


def export_pipeline(
    pipeline: Any, folder: str | Path, *, precision: str = "int4", rank: int = 32
) -> Export:
    """Write a pipeline whose denoiser stock diffusers loads as SVDQuant.

    Args:
        pipeline: pipeline of diffusers. For "int4" its denoiser is quantised with int4, group_size=64 and `svd_rank`;
            for "nvfp4" it has its own weights.
        folder: folder to write.
        precision: "int4" for GPUs of compute capability 7.5 to 8.9 and 10.0 or more, "nvfp4" for 10.0 or more.
        rank: rank of the branch for "nvfp4"; int4's is that of the quantised weights.

    Returns:
        What is in 4 bits and what is not.

    Raises:
        UsageError: the denoiser is not quantised that way, no layer fits the kernels, or diffusers is too old.
    """
    _check_diffusers()
    if precision not in GROUPS:
        raise UsageError(
            f"precision={precision!r}: there is no such precision. Choose from {', '.join(GROUPS)}."
        )
    name = "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"
    denoiser, folder = getattr(pipeline, name), Path(folder)
    tensors, config, export = denoiser_state(denoiser, precision=precision, rank=rank)
    pipeline.save_config(folder)
    for part_name, part in pipeline.components.items():
        if part_name != name and hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / part_name)
    _write(denoiser, folder / name, tensors, config)
    return export


def denoiser_state(
    denoiser: nn.Module, *, precision: str, rank: int
) -> tuple[dict[str, Tensor], dict[str, Any], Export]:
    """Return a denoiser's tensors in the exported layout, its quantisation's settings, and what they cover.

    Raises:
        UsageError: as for `export_pipeline`.
    """
    layers = _layers(denoiser, precision)
    if precision == "int4":
        rank = _rank_of(layers)
    if rank % RANK or rank < RANK:
        raise UsageError(
            f"svd_rank={rank}: the kernels take multiples of {RANK}. Quantise with svd_rank=32."
        )
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    for name, layer in layers.items():
        if not _fits(name, layer):
            continue
        state = int4_state(layer) if precision == "int4" else nvfp4_state(layer, rank=rank)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
        targets.append(name)
    if not targets:
        raise UsageError(
            f"precision={precision!r}: no layer of the {type(denoiser).__name__} has inputs and outputs that are "
            f"multiples of {TILE}, which the kernels need. Keep the model as it is."
        )
    tensors |= _others(denoiser, targets)
    dense = [n for n, m in denoiser.named_modules() if isinstance(m, PackedLayer)]
    settings = {
        "precision": precision,
        "group_size": GROUPS[precision],
        "rank": rank,
        "targets": targets,
    }
    config = {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "bfloat16",
        "svdq_w4a4": settings,
    }
    return tensors, config, Export(tuple(targets), tuple(n for n in dense if n not in targets))


def int4_state(layer: PackedLinear) -> dict[str, Tensor]:
    """Return the tensors of a layer of int4 in groups of 64 with a branch."""
    assert layer.svd_up is not None
    assert layer.svd_down is not None
    values = codes.split(layer.weight.detach(), layer.in_features, bits=4)
    scales = layer.weight_scale.detach().view(torch.bfloat16)
    return {
        "qweight": weight_order(values),
        "wscales": scale_order(scales),
        **_common(layer, layer.svd_down, layer.svd_up),
    }


def nvfp4_state(layer: nn.Linear, *, rank: int) -> dict[str, Tensor]:
    """Return the tensors of a layer in nvfp4 with a branch."""
    weight = layer.weight.detach().float()
    up, down = (part.bfloat16() for part in truncated_svd(weight, rank))
    rest = weight - up.float() @ down.float()
    groups = rest.unflatten(1, (-1, GROUPS["nvfp4"]))
    largest = groups.abs().amax(2).clamp_min(1e-12) / E2M1[-1]
    whole = (largest.max() / E4M3).bfloat16()
    scales = (largest / whole.float()).clamp(max=E4M3).to(torch.float8_e4m3fn)
    scaled = groups / (scales.float() * whole.float()).clamp_min(1e-30)[..., None]
    sizes = torch.tensor(E2M1, device=weight.device)
    # halves between two neighbouring sizes decide
    values = torch.bucketize(scaled.abs(), (sizes[1:] + sizes[:-1]) / 2) + 8 * (scaled < 0)
    return {
        "qweight": weight_order(values.flatten(1).to(torch.int8)),
        "wscales": small_scale_order(scales),
        "wcscales": torch.ones(len(weight), dtype=torch.bfloat16),
        "wtscale": whole.view(1),
        **_common(layer, down, up),
    }


def weight_order(values: Tensor) -> Tensor:
    """Return 4-bit values (N, K) int8 as the kernels read them, (N, K / 2)."""
    rows, columns = values.shape
    parts = values.reshape(rows // TILE, 8, 2, 8, columns // 64, 2, 4, 8)
    low, high = parts.permute(0, 4, 1, 3, 6, 2, 5, 7).reshape(rows, -1, 2).unbind(2)
    return ((low & 15) | (high << 4)).to(torch.int8)


def scale_order(scales: Tensor) -> Tensor:
    """Return scales (N, G) of groups of 64 as the kernels read them, (G, N)."""
    rows, groups = scales.shape
    parts = scales.reshape(rows // TILE, 8, 2, 4, 2, groups)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(groups, rows)


def small_scale_order(scales: Tensor) -> Tensor:
    """Return scales (N, G) of groups of 16 as the kernels read them, (G, N)."""
    rows, groups = scales.shape
    # float8 has no copy kernel for every layout
    parts = scales.view(torch.uint8).reshape(rows // TILE, 4, 4, 8, groups // 4, 4)
    ordered = parts.permute(0, 4, 3, 2, 1, 5).reshape(groups, rows)
    return ordered.contiguous().view(scales.dtype)


def branch_order(matrix: Tensor, *, down: bool) -> Tensor:
    """Return a branch's matrix in the order of the kernels.

    Args:
        matrix: (rank, inputs) for `down`, (outputs, rank) otherwise.
        down: whether it is the first matrix of the branch.

    Returns:
        (inputs, rank) for `down`, (outputs, rank) otherwise.
    """
    rows, columns = matrix.shape
    parts = matrix.reshape(rows // 16, 2, 8, columns // 16, 2, 4, 2)
    tiles = (3, 0) if down else (0, 3)
    ordered = parts.permute(*tiles, 2, 5, 1, 4, 6)
    return ordered.reshape((columns, rows) if down else (rows, columns))


def _common(layer: nn.Linear, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return branch, bias and smoothing factors, which are 1."""
    state = {
        "proj_down": branch_order(down.detach().bfloat16(), down=True),
        "proj_up": branch_order(up.detach().bfloat16(), down=False),
        "smooth_factor": torch.ones(layer.in_features, dtype=torch.bfloat16),
    }
    if layer.bias is not None:
        state["bias"] = scale_order(layer.bias.detach().bfloat16()[:, None])[0]
    return state


def _layers(denoiser: nn.Module, precision: str) -> dict[str, Any]:
    """Return the linear layers that the precision is made from, by name."""
    packed = {n: m for n, m in denoiser.named_modules() if isinstance(m, PackedLayer)}
    if precision == "nvfp4":
        if packed:
            raise UsageError(
                "precision='nvfp4': the denoiser is quantised already, and its numbers are made from the original "
                "weights. Load the original model."
            )
        return {n: m for n, m in denoiser.named_modules() if type(m) is nn.Linear}
    layers = {
        n: m
        for n, m in packed.items()
        if isinstance(m, PackedLinear)
        and (m.spec.bits, m.spec.group_size) == (4, GROUPS["int4"])
        and not m.spec.multiplies
    }
    if not layers:
        raise UsageError(
            "precision='int4': the denoiser has no int4 weights in groups of 64. Quantise it with backend int4, "
            "group_size=64 and svd_rank=32."
        )
    return layers


def _rank_of(layers: Mapping[str, PackedLinear]) -> int:
    return max(layer.spec.svd_rank for layer in layers.values())


def _fits(name: str, layer: Any) -> bool:
    """Return whether the kernels can compute a layer, and its inputs bear 4 bits."""
    whole = layer.in_features % TILE == 0 and layer.out_features % TILE == 0
    return whole and not any(fnmatchcase(name, pattern) for pattern in DENSE)


def _others(denoiser: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """Return all other tensors; packed layers as plain weights."""
    tensors: dict[str, Tensor] = {}
    inside = (*(f"{name}." for name in targets),)
    for name, layer in denoiser.named_modules():
        if isinstance(layer, PackedLayer) and name not in targets:
            tensors[f"{name}.weight"] = layer.dequantize()
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.detach()
            inside = (*inside, f"{name}.")
    rest = {k: v for k, v in denoiser.state_dict().items() if not k.startswith(inside)}
    tensors |= rest
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}


def _write(denoiser: Any, folder: Path, tensors: Mapping[str, Tensor], config: Any) -> None:
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    record = json.loads(denoiser.to_json_string()) | {"quantization_config": config}
    write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(whole, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _check_diffusers() -> None:
    import diffusers

    if not hasattr(diffusers, "NunchakuLiteQuantizationConfig"):
        raise UsageError(
            f"precision: diffusers {diffusers.__version__} has no NunchakuLiteQuantizationConfig. Install diffusers "
            "0.42 or later."
        )
