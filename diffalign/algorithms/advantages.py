"""Group-relative advantages: images of one prompt compete with each other.

All statistics are sums over group numbers, so they depend neither on the order of the samples nor on their
distribution over processes. A missing reward (NaN) has advantage 0 and enters no statistic.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EPSILON = 1e-4
TOLERANCE = 1e-6
"""Largest advantage, or difference within a group, that counts as zero."""
STD_SCOPES = ("global", "group")


def group_advantages(
    rewards: Tensor, group: Tensor, *, std_scope: str = "global", epsilon: float = EPSILON
) -> Tensor:
    """Return A_i = (r_i - mean of its group) / (std + epsilon), float32 (B,).

    Args:
        rewards: rewards (B,), NaN for images without a reward.
        group: group numbers (B,), integers; images with equal numbers compete.
        std_scope: "global" for one population standard deviation of all rewards (AWM, Flow-GRPO with global std), or
            "group" for each group's own (GRPO).
        epsilon: constant that is added to the standard deviation.

    Raises:
        ValueError: unknown `std_scope`, or shapes that do not fit.
    """
    if std_scope not in STD_SCOPES:
        raise ValueError(f"std_scope must be one of {STD_SCOPES}, got {std_scope!r}.")
    if rewards.shape != group.shape or rewards.ndim != 1:
        raise ValueError(
            f"rewards and group must be (B,), got {tuple(rewards.shape)} and {tuple(group.shape)}."
        )
    valid = rewards.isfinite()
    values = torch.where(valid, rewards, 0).double()
    _, index = group.unique(return_inverse=True)
    count = _sum_by(valid.double(), index).clamp(min=1)
    centred = torch.where(valid, values - (_sum_by(values, index) / count)[index], 0)
    if std_scope == "group":
        std = (_sum_by(centred.square(), index) / count).sqrt()[index]
    else:
        n = valid.sum().clamp(min=1)
        mean = values.sum() / n
        std = (torch.where(valid, values - mean, 0).square().sum() / n).sqrt()
    return (centred / (std + epsilon)).float()


def combined_advantages(
    parts: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, *, std_scope: str
) -> Tensor:
    """Return the weighted sum (B,) of each reward's own advantages (GDPO).

    No reward dominates another by its scale.
    """
    total = torch.zeros(group.shape, dtype=torch.float32)
    for name, rewards in parts.items():
        total += weights[name] * group_advantages(rewards, group, std_scope=std_scope)
    return total / max(sum(abs(weights[name]) for name in parts), EPSILON)


def clip_advantages(advantages: Tensor, *, clip: float, maximum: float) -> Tensor:
    """Clip advantages to +-clip and scale their largest magnitude to `maximum` (AWM: 5 and 1)."""
    return advantages.clamp(-clip, clip) / clip * maximum


def optimality(advantages: Tensor, *, clip: float) -> Tensor:
    """Return advantages (B,), clipped to +-clip, as values in 0..1; 0.5 stands for no advantage."""
    return (advantages / clip).clamp(-1, 1) / 2 + 0.5


def informative(rewards: Tensor, group: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """Return whether each image has a reward and its group's rewards differ, bool (B,).

    Other images have advantage 0; their forwards would only serve the proximal terms.
    """
    valid = rewards.isfinite()
    _, index = group.unique(return_inverse=True)
    n = int(index.max()) + 1 if len(index) else 0
    low = torch.full((n,), float("inf"), dtype=rewards.dtype)
    high = torch.full((n,), float("-inf"), dtype=rewards.dtype)
    low.scatter_reduce_(0, index[valid], rewards[valid], "amin")
    high.scatter_reduce_(0, index[valid], rewards[valid], "amax")
    return valid & ((high - low)[index] > tolerance)


def group_moments(latents: Tensor, group: Tensor, *, groups: int) -> Tensor:
    """Return sums (G, 1 + 2 D) of each group's images, float64.

    A row has the number of images, the sums of their D values, and the sums of the squares. Sums of parts of a batch
    add up to those of the batch.

    Args:
        latents: latents (B, ...).
        group: group numbers (B,), integers below `groups`.
        groups: number of groups G.
    """
    values = latents.flatten(1)
    sums = values.new_zeros(groups, 1 + 2 * values.shape[1], dtype=torch.float64)
    # Rows are converted one by one, since float64 is large.
    for row, g in zip(values, group.tolist(), strict=True):
        plain = row.double()
        sums[g] += torch.cat([plain.new_ones(1), plain, plain.square()])
    return sums


def group_diversity(moments: Tensor) -> float:
    """Return the standard deviation of images within their group.

    It is a mean over values and then over groups of at least two images; NaN without such a group. A policy that has
    learnt to generate one image for each prompt has 0, which rewards do not show.

    Args:
        moments: result of `group_moments`.
    """
    moments = moments[moments[:, 0] > 1]
    count, (total, squares) = moments[:, :1], moments[:, 1:].chunk(2, 1)
    variance = (squares - total.square() / count) / (count - 1)
    return variance.clamp_min(0).sqrt().mean().item()


def _sum_by(values: Tensor, index: Tensor) -> Tensor:
    total = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=values.dtype)
    return total.index_add_(0, index, values)
