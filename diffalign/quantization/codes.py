"""Weights as integers of 8, 4, 3 or 2 bits: one scale per group, no zero point.

A scale may be negative. Two's complement has one code more below zero than above, so the largest weight of a group
gets the lowest or second-lowest code, whichever errs less, whatever its sign. On the Shapes denoisers this reduces the
error of a 4-bit prediction by 8 to 14 % compared with max|w| / 7. Scales that clip large weights reduce the squared
error of the weights by another tenth, but increase the prediction's error on one of three denoisers: large weights
matter more.

With moments of the layer's inputs the codes are those of GPTQ (`rounding`), against the same scales.

Codes are stored in planes of 8, 4, 2 or 1 bits, which fill bytes: 3 bits are a plane of the two low bits beside one of
the sign. A byte of a plane holds codes that are far apart in a row, so that the first codes of all bytes are the row's
beginning, as in the 4-bit form of the first release.

Scales are bfloat16, which has float32's range, so that no weight's scale under- or overflows. Rounding the scales
costs nothing, since codes are computed with the rounded scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.quantization.rounding import Curvature, gptq

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Widths of the planes of a code, from the lowest bit to the sign."""
CHUNK = 2**22
"""Weights that are rounded at once in float32, which bounds the extra memory of packing."""


def packed_shape(rows: int, columns: int, *, bits: int) -> tuple[int, int]:
    """Return the shape of the int8 tensor that holds (rows, columns) codes."""
    return rows, sum(_plane_bytes(columns, width) for width in PLANES[bits])


def scales_shape(rows: int, columns: int, *, group_size: int | None) -> tuple[int, int]:
    """Return the shape of the scales. The last group of a row may be shorter than the others."""
    return rows, -(-columns // (group_size or columns))


def pack(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None = 64,
    curvature: Curvature | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise a weight (rows, ...), flattened to (rows, K).

    Args:
        weight: finite floating-point weight.
        bits: 8, 4, 3 or 2.
        group_size: weights of a row that share a scale; None for the whole row.
        curvature: prepared moments of the layer's inputs, for codes by GPTQ; None for the nearest codes.

    Returns:
        Codes in int8, in the shape of `packed_shape`, and scales (rows, groups) in bfloat16.

    Raises:
        ValueError: there are no codes of so many bits.
    """
    if bits not in PLANES:
        raise ValueError(f"bits must be 8, 4, 3 or 2, not {bits}.")
    matrix = weight.detach().flatten(1)
    step = max(1, CHUNK // matrix.shape[1])
    parts = [_quantise(chunk, bits, group_size) for chunk in matrix.split(step)]
    codes, scales = (torch.cat(p) for p in zip(*parts, strict=True))
    if curvature is not None:
        codes = gptq(matrix, codes, scales, curvature, bits=bits, group_size=group_size)
    return join(codes, bits=bits), scales


def join(codes: Tensor, *, bits: int) -> Tensor:
    """Return codes (rows, K) int8 in planes, in the shape of `packed_shape`."""
    if bits == 8:
        return codes
    planes, low = [], 0
    for width in PLANES[bits]:
        size = _plane_bytes(codes.shape[1], width)
        parts = F.pad((codes >> low) & (2**width - 1), (0, size * (8 // width) - codes.shape[1]))
        packed = parts[:, :size].clone()
        for i, part in enumerate(parts[:, size:].split(size, 1), 1):
            packed |= part << (i * width)
        planes.append(packed)
        low += width
    return torch.cat(planes, 1)


def split(packed: Tensor, columns: int, *, bits: int) -> Tensor:
    """Return the codes (rows, K) int8 of planes, the inverse of `join`."""
    if bits == 8:
        return packed
    widths = PLANES[bits]
    planes = packed.split([_plane_bytes(columns, width) for width in widths], 1)
    # the last plane holds the sign, which an arithmetic shift to the right extends
    codes = _sign_extended(planes[-1], widths[-1])[:, :columns]
    for plane, width in zip(planes[-2::-1], widths[-2::-1], strict=True):
        parts = [(plane >> start) & (2**width - 1) for start in range(0, 8, width)]
        codes = (codes << width) | torch.cat(parts, 1)[:, :columns]
    return codes


def _plane_bytes(columns: int, width: int) -> int:
    return -(-columns // (8 // width))


def _sign_extended(plane: Tensor, width: int) -> Tensor:
    """Return the codes of a plane, with its highest bit as their sign."""
    parts = [(plane << (8 - width - start)) >> (8 - width) for start in range(0, 8 - width, width)]
    return torch.cat((*parts, plane >> (8 - width)), 1)


def unpack(
    packed: Tensor,
    scales: Tensor,
    *,
    shape: Sequence[int],
    bits: int,
    group_size: int | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weights in `shape`, the inverse of `pack` except for rounding."""
    columns = math.prod(shape[1:])
    codes = split(packed, columns, bits=bits)
    # float16 has the range of the weights, but not the range of the scales.
    work = torch.float32 if dtype == torch.float16 else dtype
    values = codes.to(work)
    group = group_size or columns
    if columns % group:
        values *= scales.to(work).repeat_interleave(group, dim=1)[:, :columns]
    else:
        values.unflatten(1, (-1, group)).mul_(scales.to(work)[..., None])
    return values.to(dtype).reshape(shape)


def _quantise(rows: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return codes (rows, K) int8 and scales (rows, groups) of weights (rows, K)."""
    columns = rows.shape[1]
    group = group_size or columns
    groups = F.pad(rows.float(), (0, -columns % group)).unflatten(1, (-1, group))
    lowest = 2 ** (bits - 1)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    # Errors are divided by the largest weight, since their squares have twice the range of weights.
    unit = torch.where(extreme == 0, 1, extreme)
    codes, scales = torch.zeros_like(groups), torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf)
    for level in (lowest - 1, lowest):
        scale = (-extreme / level).bfloat16().float()
        code = torch.where(scale == 0, 0, groups / scale).round().clamp(-lowest, lowest - 1)
        error = ((groups - code * scale) / unit).square().sum(-1, keepdim=True)
        better = error < least
        codes = torch.where(better, code, codes)
        scales = torch.where(better, scale, scales)
        least = torch.where(better, error, least)
    return codes.flatten(1)[:, :columns].to(torch.int8), scales.squeeze(-1).bfloat16()
