"""Closed-form factors that bring a quantised trajectory nearest to the full-precision one.

They are computed step by step, without a search. Both trajectories have the same initial noise and the same noise in
each step. With u = A x and v = B m on the corrected quantised trajectory and y = x'_fp - C z, the best pair of a step
solves two linear equations. It contains PTQD's correction of correlated error (He et al. 2023), c_e = 1 / (1 + k).
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_factors(u: Tensor, v: Tensor, y: Tensor, *, ridge: float = 0.0) -> tuple[float, float]:
    """Return the best factors (c_x, c_e) of a step by ridge regression.

    They minimise |c_x u + c_e v - y|^2 + rho ((c_x - 1)^2 + (c_e - 1)^2).

    Args:
        u, v, y: tensors of one shape with all images of a step.
        ridge: rho as a share of the mean of |u|^2 and |v|^2. It decides where u and v are nearly parallel.

    Returns:
        The factors; ones if u or v is zero, both are parallel, or a value is not finite.
    """
    u, v, y = (part.double().flatten() for part in (u, v, y))
    uu, uv, vv = u @ u, u @ v, v @ v
    rho = ridge * (uu + vv) / 2
    matrix = torch.stack([torch.stack([uu + rho, uv]), torch.stack([uv, vv + rho])])
    right = torch.stack([u @ y + rho, v @ y + rho])
    if not torch.isfinite(matrix).all() or torch.linalg.cond(matrix) > 1e12:
        # u or v is zero, or both are parallel.
        return 1.0, 1.0
    factors = torch.linalg.solve(matrix, right)
    if not torch.isfinite(factors).all():
        return 1.0, 1.0
    return float(factors[0]), float(factors[1])
