"""Inversion-DPO's own forms of a loss: distances to the reference along its inverted trajectories.

The chord form, which is trained by default, needs nothing here: the noise that an inversion implies
(`noise.implied_noise`) is a target like any other, and the losses are those of `preference`. What follows is what the
paper's release computes (`released`) and what its figure shows (`figure`), for comparison. Both are quadratic in the
distance of policy and reference, so that their gradient is zero where training starts from the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.diffusion.paths import Path, RectifiedFlow

SIGNS = {"released": 1.0, "figure": -1.0}


def trajectory_weight(path: Path, timesteps: Tensor) -> Tensor:
    """(B,) weight of a step's distance: 1 / (2 a^2) on a variance-preserving path, as in the release; 1 for flows."""
    if isinstance(path, RectifiedFlow):
        return torch.ones_like(timesteps, dtype=torch.float32)
    return 1 / (2 * path.signal(timesteps).square())


def trajectory_loss(
    winner_distance: Tensor, loser_distance: Tensor, *, beta: float, variant: str
) -> Tensor:
    """(B,) -log sigma(+- beta / 2 (D_w - D_l)), D the weighted mean over steps of |f - f_ref|^2: the release rewards a
    larger distance of the winner's, the paper's figure a smaller one."""
    return -F.logsigmoid(SIGNS[variant] * beta / 2 * (winner_distance - loser_distance))
