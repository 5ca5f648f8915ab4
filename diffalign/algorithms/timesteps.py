"""Which timesteps a forward-process loss is trained on: strata of the rollout's own grid, drawn for every sample.

The released AWM draws one set of strata for a whole micro-batch; drawing it for every sample costs nothing and has a
lower variance.
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
    """Cut the indices of a grid into contiguous strata of (nearly) equal size, one for each timestep of a sample.

    Args:
        num_grid: points of the rollout's grid; index 0 is pure noise.
        start, stop: the share of the grid that is used, counted from the noise (0) to the clean end (1).
        independent: do not cut it; every stratum is the whole of that share.
    """
    first, last = round(start * num_grid), round(stop * num_grid)
    if not 0 <= first < last <= num_grid:
        raise UsageError(
            f"timestep range {start}..{stop} leaves nothing of a grid of {num_grid} points"
        )
    if independent and num_strata >= 1:
        return [range(first, last)] * num_strata
    if not 1 <= num_strata <= last - first:
        raise UsageError(
            f"{num_strata} timesteps per image do not fit into {last - first} points of the rollout's grid; "
            "use fewer, or more rollout steps"
        )
    cuts = [first + round(i * (last - first) / num_strata) for i in range(num_strata + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def draw(parts: Sequence[range], *, generator: torch.Generator | None = None) -> Tensor:
    """(T,) grid indices for one sample, one from each stratum."""
    uniform = torch.rand(len(parts), generator=generator, dtype=torch.float64)
    return torch.tensor([p.start + int(u * len(p)) for p, u in zip(parts, uniform, strict=True)])
