"""The factors that bring a quantised trajectory nearest to the full-precision one, step by step, without a search.

Both trajectories start from the same noise and meet the same noise on the way. With u = A x and v = B m on the
corrected quantised trajectory and y = x'_fp - C z, the best pair of a step solves two linear equations. It contains
PTQD's correction of correlated error (He et al. 2023), c_e = 1 / (1 + k).
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_factors(u: Tensor, v: Tensor, y: Tensor, *, ridge: float = 0.0) -> tuple[float, float]:
    """(c_x, c_e) that minimise |c_x u + c_e v - y|^2 + rho ((c_x - 1)^2 + (c_e - 1)^2).

    Args:
        u, v, y: tensors of one shape, all images of a step together.
        ridge: rho as a share of the mean of |u|^2 and |v|^2. Where u and v are nearly parallel it decides.
    """
    u, v, y = (part.double().flatten() for part in (u, v, y))
    uu, uv, vv = u @ u, u @ v, v @ v
    rho = ridge * (uu + vv) / 2
    matrix = torch.stack([torch.stack([uu + rho, uv]), torch.stack([uv, vv + rho])])
    right = torch.stack([u @ y + rho, v @ y + rho])
    if not torch.isfinite(matrix).all() or torch.linalg.cond(matrix) > 1e12:
        return 1.0, 1.0  # one of them is nothing, or they are one
    found = torch.linalg.solve(matrix, right)
    if not torch.isfinite(found).all():
        return 1.0, 1.0
    return float(found[0]), float(found[1])
