"""Inversion-DPO's own losses: distances to the reference along its inverted trajectories.

The chord form, which is trained by default, is not in this module: the noise that an inversion implies
(`paths.implied_noise`) is a target like any other, and the losses are those of `preference`. For comparison this module
has the forms of the paper's release (`released`) and figure (`figure`). Both are quadratic in the distance of policy
and reference, so that their gradient is zero where training starts from the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.diffusion.paths import Path, RectifiedFlow

SIGNS = {"released": 1.0, "figure": -1.0}


def trajectory_weight(path: Path, timesteps: Tensor) -> Tensor:
    """Return the weight (B,) of a step's distance.

    It is 1 / (2 a^2) on a variance-preserving path, as in the release, and 1 for flows.
    """
    if isinstance(path, RectifiedFlow):
        return torch.ones_like(timesteps, dtype=torch.float32)
    return 1 / (2 * path.signal(timesteps).square())


def trajectory_loss(
    winner_distance: Tensor, loser_distance: Tensor, *, beta: float, variant: str
) -> Tensor:
    """Return the loss (B,) -log sigma(+- beta / 2 (D_w - D_l)).

    D is the weighted mean over steps of |f - f_ref|^2. The release rewards a larger distance of the winner's, the
    paper's figure a smaller one.
    """
    return -F.logsigmoid(SIGNS[variant] * beta / 2 * (winner_distance - loser_distance))
