"""Common parts of losses on the forward process.

Clean latents are noised, and policies predict for the same noise. The module of such a loss ends with a `ForwardLoss`,
which the registry of methods names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Metrics = dict[str, Tensor]
NORM_FLOOR = 1e-8


@dataclass(frozen=True)
class ForwardSample:
    """B noisy latents with their targets and predictions.

    Attributes:
        latents: clean latents (B, C, H, W).
        noisy_latents: noisy latents (B, C, H, W).
        target: targets (B, C, H, W) of the predictions.
        sigmas: noise levels (B,) in 0..1.
        advantages: advantages (B,), neither clipped nor scaled.
        model_pred: predictions of the policy (B, C, H, W).
        old_pred: predictions (B, C, H, W) of the policy that generated the images; None if it is the current one.
        reference_pred: predictions (B, C, H, W) of the reference model without guidance; None if no loss needs them.
        group_mean: means (B,) of a `GroupStatistic` over the images of the sample's prompt, at its timestep.
        partner: clean latents (B, C, H, W) of the other image of each pair, for losses on pairs. The advantages are
            then half the differences of the two images'.
    """

    latents: Tensor
    noisy_latents: Tensor
    target: Tensor
    sigmas: Tensor
    advantages: Tensor
    model_pred: Tensor
    old_pred: Tensor | None = None
    reference_pred: Tensor | None = None
    group_mean: Tensor | None = None
    partner: Tensor | None = None


@dataclass(frozen=True)
class GroupStatistic:
    """Mean over the images of a prompt that a loss needs before its gradient.

    It is computed over all images of an update, by forwards without gradients, so that neither the micro-batch size
    nor the number of processes changes it.

    Attributes:
        values: maps a sample without `group_mean` and the algorithm's settings to the values (B,) to average.
        needs_reference: whether `values` needs `reference_pred`.
        needs_old: whether `values` needs `old_pred`.
    """

    values: Callable[[ForwardSample, Any], Tensor]
    needs_reference: bool = False
    needs_old: bool = False


@dataclass(frozen=True)
class ForwardLoss:
    """Loss on the forward process, and what it needs besides the policy's prediction.

    Attributes:
        loss: maps a sample and the algorithm's settings to the losses (B,) and their metrics, (B,) each.
        metrics: names of the metrics.
        needs_old: whether the loss needs an old policy even with one optimizer step per rollout. Without it the old
            policy is then the current one.
        needs_reference: whether the loss needs `reference_pred`.
        own_sampler: whether rollouts come from a policy of their own, apart from the old policy.
        group: mean over the images of a prompt that the loss needs as `group_mean`.
        paired: whether the images of a prompt share their initial noise in pairs, and the loss needs `partner`. The
            settings have `churn` then.
    """

    loss: Callable[[ForwardSample, Any], tuple[Tensor, Metrics]]
    metrics: tuple[str, ...]
    needs_old: bool = False
    needs_reference: bool = False
    own_sampler: bool = False
    group: GroupStatistic | None = None
    paired: bool = False


def matching_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """Return e (B,), the mean squared error over all dimensions but the first, in float32."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


def proximal_loss(model_pred: Tensor, other_pred: Tensor) -> Tensor:
    """Return the mean squared distance (B,) of two predictions for the same input.

    No gradient passes through `other_pred`. Up to a weight, the distance is the KL divergence of the two policies'
    path measures.
    """
    return matching_error(model_pred, other_pred.detach())


def lag_decay(update: int, *, ramp: float, maximum: float, start: float = 0.0) -> float:
    """Return a lagged policy's decay min(maximum, start + ramp * update); `update` counts from 1."""
    return min(maximum, start + ramp * update)


def norm_ratio(model_pred: Tensor, reference_pred: Tensor) -> Tensor:
    """Return the norm (B,) of a prediction over that of the reference's.

    No gradient passes through the reference's prediction.
    """
    norms = (p.float().flatten(1).norm(dim=1) for p in (model_pred, reference_pred.detach()))
    policy, reference = norms
    ratio: Tensor = policy / reference.clamp(min=NORM_FLOOR)
    return ratio


def norm_hinge(ratio: Tensor) -> Tensor:
    """Return NormGuard's hinge (B,): the square of a ratio's excess over 1 (arXiv 2606.27771)."""
    return (ratio - 1).clamp(min=0).square()
