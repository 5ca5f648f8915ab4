"""Group-relative advantages: images of one prompt compete with each other.

All statistics are sums over group numbers, so they do not depend on the order of the samples or on how they are spread
over processes. A reward that could not be computed (NaN) has advantage 0 and takes no part in any statistic.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EPSILON = 1e-4
TOLERANCE = 1e-6
"""Largest difference of advantages that counts as none."""
STD_SCOPES = ("global", "group")


def group_advantages(
    rewards: Tensor, group: Tensor, *, std_scope: str = "global", epsilon: float = EPSILON
) -> Tensor:
    """A_i = (r_i - mean of its group) / (std + epsilon), float32 (B,).

    Args:
        rewards: (B,), NaN for images without a reward.
        group: (B,) integers; equal numbers compete.
        std_scope: "global", one population standard deviation of all rewards (AWM, Flow-GRPO with global std), or
            "group", each group's own (GRPO).
    """
    if std_scope not in STD_SCOPES:
        raise ValueError(f"std_scope must be one of {STD_SCOPES}, got {std_scope!r}")
    if rewards.shape != group.shape or rewards.ndim != 1:
        raise ValueError(
            f"rewards and group must be (B,), got {tuple(rewards.shape)} and {tuple(group.shape)}"
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
    """Weighted sum of each reward's own advantages (GDPO): no reward drowns another by its scale."""
    total = torch.zeros(group.shape, dtype=torch.float32)
    for name, rewards in parts.items():
        total += weights[name] * group_advantages(rewards, group, std_scope=std_scope)
    return total / max(sum(abs(weights[name]) for name in parts), EPSILON)


def clip_advantages(advantages: Tensor, *, clip: float, maximum: float) -> Tensor:
    """Clip to +-clip, then scale so that the largest possible magnitude is `maximum` (AWM: 5 and 1)."""
    return advantages.clamp(-clip, clip) / clip * maximum


def informative(rewards: Tensor, group: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """(B,) bool: the image has a reward, and the rewards of its group are not all the same.

    The others have advantage 0 and would cost forwards for nothing but their share of the proximal terms.
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
    """(G, 1 + 2 D) float64: images of each group, and the sums of their D values and of the values' squares. Those of
    parts of a batch add up to those of the batch.

    Args:
        latents: (B, ...); group: (B,) integers below `groups`.
    """
    values = latents.flatten(1)
    found = values.new_zeros(groups, 1 + 2 * values.shape[1], dtype=torch.float64)
    for row, g in zip(values, group.tolist(), strict=True):  # one by one: float64 is large
        plain = row.double()
        found[g] += torch.cat([plain.new_ones(1), plain, plain.square()])
    return found


def group_diversity(moments: Tensor) -> float:
    """Standard deviation of an image's values within its group: mean over values, then over groups of at least two
    images; NaN without any.

    A policy that has learnt to draw one image for a prompt has 0; rewards alone do not show it.

    Args:
        moments: of `group_moments`.
    """
    moments = moments[moments[:, 0] > 1]
    count, (total, squares) = moments[:, :1], moments[:, 1:].chunk(2, 1)
    variance = (squares - total.square() / count) / (count - 1)
    return variance.clamp_min(0).sqrt().mean().item()


def _sum_by(values: Tensor, index: Tensor) -> Tensor:
    total = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=values.dtype)
    return total.index_add_(0, index, values)
