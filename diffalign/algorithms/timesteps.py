"""Training timesteps of forward-process losses: strata of the rollout's own grid.

Timesteps are drawn for every sample. The released AWM draws one set of strata per micro-batch; drawing per sample
costs nothing and has a lower variance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.core.errors import UsageError


def strata(
    num_grid: int,
    num_strata: int,
    *,
    start: float = 0.0,
    stop: float = 1.0,
    independent: bool = False,
) -> list[range]:
    """Cut the indices of a grid into contiguous strata of nearly equal size.

    Each stratum gives one timestep of a sample.

    Args:
        num_grid: points of the rollout's grid; index 0 is pure noise.
        num_strata: number of strata.
        start: start of the used share of the grid; 0 is the noise.
        stop: end of the used share of the grid; 1 is the clean end.
        independent: whether every stratum is the whole share, without cutting it.

    Raises:
        UsageError: the share is empty, or has fewer points than strata.
    """
    first, last = round(start * num_grid), round(stop * num_grid)
    if not 0 <= first < last <= num_grid:
        raise UsageError(
            f"timestep_start={start}, timestep_stop={stop}: this range has no point of a grid of {num_grid}. "
            "Widen it."
        )
    if independent and num_strata >= 1:
        return [range(first, last)] * num_strata
    if not 1 <= num_strata <= last - first:
        raise UsageError(
            f"{num_strata} timesteps per image do not fit into {last - first} points of the rollout's grid. "
            "Use fewer timesteps or more rollout steps."
        )
    cuts = [first + round(i * (last - first) / num_strata) for i in range(num_strata + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def draw(parts: Sequence[range], *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one grid index from each stratum, (T,), for one sample."""
    uniform = torch.rand(len(parts), generator=generator, dtype=torch.float64)
    return torch.tensor([p.start + int(u * len(p)) for p, u in zip(parts, uniform, strict=True)])
