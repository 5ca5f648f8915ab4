"""GPTQ: codes of a weight by which a layer's outputs err least, rather than its weights.

Frantar et al. 2023 (arXiv 2210.17323). A layer with weights W and inputs x errs by tr((W - Q) H (W - Q)^T) with
H = E[x x^T]. The columns are rounded one after another, and each one's error is made up for by the columns that follow
(equations 2 and 3 there, by the Cholesky factor of H^-1 as in its section 3.3). The columns come in the order of
falling H_kk, as in the released code's `act_order`.

The scales are those of rounding to nearest, so the format and the time of a forward stay the same. Scales that are
chosen again for what is left of a weight, clipped scales, zero points, code books, rotations and alternations of
codes and scales gave nothing on top (docs/qsched.md).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.quantization.moments import Moments

BLOCK = 128
"""Columns whose errors are passed on together to the columns after them."""
CHUNK = 2**24
"""Weights that are rounded at once in float32."""
DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean of H_kk that are added to H.

The next one is taken if the one before leaves H singular.
"""


@dataclass(frozen=True)
class Curvature:
    """Damped H of a layer, prepared for the rounding of its weights.

    Attributes:
        second: H plus its damping, (K, K) in float32, its columns in the order of `order`.
        factor: upper triangular U with H^-1 = U^T U, (K, K) in float32, in the same order.
        order: numbers (K,) of the columns in the order in which they are rounded.
        damping: share of the mean of H_kk that was added.
    """

    second: Tensor
    factor: Tensor
    order: Tensor
    damping: float

    @classmethod
    def of(cls, second: Tensor) -> Curvature | None:
        """Prepare moments (K, K). Return None if they are all zero.

        Raises:
            UsageError: the moments are not finite.
        """
        if not second.isfinite().all():
            raise UsageError(
                "moments: second moments of inputs are not finite. Calibrate again in bfloat16 or float32."
            )
        mean = second.diagonal().double().mean()
        if mean <= 0:
            return None
        order = second.diagonal().argsort(descending=True, stable=True)
        ordered = second[order][:, order].double()
        diagonal = ordered.diagonal()
        added = 0.0
        for damping in DAMPING:
            diagonal.add_((damping - added) * mean)
            added = damping
            factor = _inverse_factor(ordered)
            if factor is not None:
                return cls(ordered.float(), factor.float(), order, damping)
        raise UsageError(
            "moments: a matrix of second moments has no inverse even with its own mean added. Calibrate again with "
            "other prompts, or use rounding=nearest."
        )

    def errors(self, difference: Tensor) -> Tensor:
        """Return the errors (rows,) of the outputs, d H d^T, of weight errors (rows, K)."""
        ordered = difference[:, self.order]
        return (ordered @ self.second).mul_(ordered).sum(1)


def curvatures(
    layers: Container[str], moments: Iterable[Mapping[str, Moments]]
) -> Iterator[tuple[str, Moments, Curvature | None]]:
    """Yield the name, the moments and the curvature of each layer that has moments.

    Layers that read the same tensor share one factorisation.
    """
    for part in moments:
        measured, curvature = None, None
        for name in (n for n in part if n in layers):
            if part[name] is not measured:
                measured = part[name]
                curvature = Curvature.of(measured.second)
            yield name, part[name], curvature


def gptq(
    weight: Tensor,
    nearest: Tensor,
    scales: Tensor,
    curvature: Curvature | None,
    *,
    bits: int,
    group_size: int | None,
) -> Tensor:
    """Return the codes of a weight by GPTQ.

    A row keeps its nearest codes if they err less on the damped moments.

    Args:
        weight: weight (rows, K).
        nearest: codes of rounding to nearest (rows, K) in int8.
        scales: scales (rows, groups), with which the codes are multiplied.
        curvature: prepared moments of the inputs; None for inputs that are always zero.
        bits: bits of a code.
        group_size: weights of a row that share a scale; None for the whole row.

    Returns:
        Codes (rows, K) in int8.
    """
    if curvature is None:
        return nearest
    step = max(1, CHUNK // weight.shape[1])
    parts = zip(weight.split(step), nearest.split(step), scales.split(step), strict=True)
    return torch.cat([_chunk(*part, curvature, bits, group_size) for part in parts])


def _chunk(
    weight: Tensor,
    nearest: Tensor,
    scales: Tensor,
    curvature: Curvature,
    bits: int,
    group_size: int | None,
) -> Tensor:
    """Return the better codes of each row of some rows."""
    columns = weight.shape[1]
    group = group_size or columns
    by_column = scales.float().repeat_interleave(group, 1)[:, :columns]
    codes = torch.empty_like(nearest)
    codes[:, curvature.order] = _columns(
        weight.float()[:, curvature.order], by_column[:, curvature.order], curvature.factor, bits
    )
    # errors are relative to a row's largest weight, since their squares have twice the range of weights
    unit = weight.abs().amax(1, keepdim=True).float()
    unit = torch.where(unit == 0, 1, unit)
    errors = [curvature.errors((weight - c * by_column) / unit) for c in (codes, nearest)]
    return torch.where((errors[0] < errors[1])[:, None], codes, nearest)


def _columns(weight: Tensor, scales: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Round columns (rows, K) from the first to the last, and pass their errors on."""
    # a column is a row in memory
    rest, scales = weight.mT.contiguous(), scales.mT.contiguous()
    divisors = torch.where(scales == 0, torch.inf, scales)
    codes = torch.empty_like(rest, dtype=torch.int8)
    lowest = 2 ** (bits - 1)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        errors = torch.empty_like(rest[start:stop])
        for k in range(start, stop):
            code = (rest[k] / divisors[k]).round_().clamp_(-lowest, lowest - 1)
            codes[k] = code
            error = (rest[k] - code * scales[k]).div_(factor[k, k])
            errors[k - start] = error
            rest[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].mT, errors, alpha=-1)
    return codes.mT


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return upper triangular U with U^T U = matrix^-1; None if the matrix is singular."""
    # with both orders reversed, the lower factor L gives matrix = R R^T for R upper, and U = R^-1
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed:
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return factor.flip(0, 1)
