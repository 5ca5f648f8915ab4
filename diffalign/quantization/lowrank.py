"""SVDQuant's low-rank branch for packed weights: W ~ Q(W - L1 L2) + L1 L2.

The method is by Li et al. 2024 (arXiv 2411.05007). L1 L2 is the truncated SVD of W diag(s) with 1 / s folded into L2,
so that it contains the large part of W where the inputs are large, and Q(W - L1 L2) has less to round. Both are then
fitted alternately, as in the paper's refinement. Activations keep 16 bits here, so s only weighs: s = a^alpha, where a
is an input's root mean square, and alpha is 0 or 1/2, whichever errs less on these inputs. On the layers of the Shapes
denoisers this is no worse than the paper's grid of s = max|x|^alpha / max|w|^(1 - alpha).

On these layers rank 8 reduces the error of a 4-bit prediction by 22 to 51 %, and the inputs' statistics change that by
a few per cent. Where a few inputs are thirty times larger than the others, these statistics leave a quarter of the
error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffalign.quantization import codes
from diffalign.quantization.rounding import Curvature

ALPHAS = (0.0, 0.5)
EXACT = 512
"""Smaller side of a matrix above which the SVD is randomised, with a fixed seed."""


@dataclass(frozen=True)
class Decomposition:
    """Packed rest and low-rank branch of a weight (rows, K).

    The tensors `packed` and `scales` are the result of `codes.pack`; the branch `up` @ `down` has the weight's dtype.
    """

    packed: Tensor
    scales: Tensor
    up: Tensor
    """Factor (rows, rank)."""
    down: Tensor
    """Factor (rank, K)."""
    error: float
    """Sum of squared weight errors of the nearest codes.

    Each error counts times its input's mean square, if that is given.
    """


def decompose(
    weight: Tensor,
    *,
    rank: int,
    bits: int,
    group_size: int | None = 64,
    input_scale: Tensor | None = None,
    curvature: Curvature | None = None,
    rounds: int = 10,
) -> Decomposition:
    """Split a weight (rows, channels, ...), flattened to (rows, K), into codes and a branch.

    Args:
        weight: the weight.
        rank: rank of the branch, from 1 to min(rows, K).
        bits: 8, 4, 3 or 2.
        group_size: weights of a row that share a scale; None for the whole row.
        input_scale: root mean squares (channels,) or (K,) of the inputs; None weighs all inputs alike.
        curvature: prepared moments of the inputs, by which the rest is rounded at the end; None for the nearest codes.
        rounds: largest number of refinements, each (L1, L2) = SVD of W - Q and then Q of W - L1 L2. They stop when the
            error no longer decreases.
    """
    matrix = weight.detach().flatten(1).float()
    importance = torch.ones_like(matrix[0])
    if input_scale is not None:
        scale = input_scale.to(matrix).clamp_min(float(input_scale.max()) * 1e-6)
        if scale.any():
            importance = scale.repeat_interleave(matrix.shape[1] // len(scale))

    def fit(target: Tensor, smoothing: Tensor) -> tuple[Decomposition, Tensor]:
        up, down = truncated_svd(target * smoothing, rank)
        up, down = up.to(weight.dtype), (down / smoothing).to(weight.dtype)
        rest = matrix - up.float() @ down.float()
        packed, scales = codes.pack(rest, bits=bits, group_size=group_size)
        rounded = codes.unpack(packed, scales, shape=matrix.shape, bits=bits, group_size=group_size)
        error = float(((rest - rounded) * importance).square().sum())
        return Decomposition(packed, scales, up, down, error), rounded

    def refine(smoothing: Tensor) -> Decomposition:
        best, rounded = fit(matrix, smoothing)
        for _ in range(rounds):
            following, rounded = fit(matrix - rounded, smoothing)
            if following.error >= best.error:
                break
            best = following
        return best

    alphas = ALPHAS if input_scale is not None else (0.0,)
    best = min((refine(importance**alpha) for alpha in alphas), key=lambda fitted: fitted.error)
    if curvature is None:
        return best
    rest = matrix - best.up.float() @ best.down.float()
    packed, scales = codes.pack(rest, bits=bits, group_size=group_size, curvature=curvature)
    return replace(best, packed=packed, scales=scales)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best (rows, rank) @ (rank, K), with the singular values split evenly."""
    if min(matrix.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.mT
    else:
        devices = [matrix.device] if matrix.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).mT


@torch.no_grad()
def collect_input_scales(module: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Return root mean squares (channels,) of layers' inputs, by layer, while `run()` runs.

    The layers are linear layers and convolutions of `module`.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str, channel_dim: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().float().movedim(channel_dim, -1).flatten(0, -2)
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + rows.square().sum(0), count + len(rows))

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name, -1 if type(layer) is nn.Linear else -3))
        for name, layer in module.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / count).sqrt() for name, (total, count) in sums.items()}
