"""FDFO: finite difference flow optimization (McAllister et al. 2026, arXiv 2603.12893).

Two images of one prompt share their initial noise and branch by a little fresh noise in every step. Their difference d
= (x0_1 - x0_2) / 2 and the difference of their rewards R = (R_1 - R_2) / 2 estimate a direction in which the reward
rises. At every state of an image's own rollout the target is the velocity of that rollout, moved by d: v* = v_rollout -
d / (mean d^2 + 1e-6), and for the other image of the pair with the opposite sign. With l = -mean (v - v*)^2 and l_0 the
same for v_rollout the ratio is rho = exp(l - l_0), and the loss is -R rho + |R| / (2 c) (rho - 1)^2. Its minimum lies
at rho = 1 + c sign(R), so that a rollout serves several optimizer steps.
"""

from __future__ import annotations

from torch import Tensor

from diffalign.algorithms.forward_process import (
    ForwardLoss,
    ForwardSample,
    Metrics,
    matching_error,
)
from diffalign.config.fdfo import FDFOConfig

DISTANCE_FLOOR = 1e-6


def direction(latents: Tensor, partner: Tensor) -> Tensor:
    """Return half the difference (B, ...) of a pair's latents over its square.

    It is d / (mean d^2 + 1e-6), d being half the difference.

    Args:
        latents: clean latents (B, ...).
        partner: clean latents (B, ...) of the other image of each pair.
    """
    half = (latents.float() - partner.float()) / 2
    scale = half.square().flatten(1).mean(1) + DISTANCE_FLOOR
    return half / scale.view(-1, *[1] * (half.ndim - 1))


def penalized_surrogate(ratio: Tensor, difference: Tensor, *, clip_range: float) -> Tensor:
    """Return -R rho + |R| / (2 c) (rho - 1)^2, each (B,).

    Args:
        ratio: likelihood ratios rho (B,).
        difference: reward differences R (B,).
        clip_range: c, the change of rho at which the loss is least.
    """
    return -difference * ratio + difference.abs() / (2 * clip_range) * (ratio - 1).square()


def loss(sample: ForwardSample, config: FDFOConfig) -> tuple[Tensor, Metrics]:
    """Return the loss (B,) and its metrics `ratio` and `moved`, the ratio's distance from 1.

    Raises:
        ValueError: the sample has no other image of the pair.
    """
    if sample.partner is None:
        raise ValueError("FDFO needs the other image of each pair.")
    own = sample.model_pred if sample.old_pred is None else sample.old_pred
    rollout = own.detach().float()
    move = direction(sample.latents, sample.partner)
    likelihood = -matching_error(sample.model_pred, rollout - move)
    start = -matching_error(rollout, rollout - move)
    ratio = (likelihood - start).exp()
    clip = config.advantage_clip
    difference = sample.advantages.clamp(-clip, clip)
    value = penalized_surrogate(ratio, difference, clip_range=config.clip_range)
    return value, {"ratio": ratio.detach(), "moved": (ratio.detach() - 1).abs()}


LOSS = ForwardLoss(loss, metrics=("ratio", "moved"), paired=True)
