"""Common parts of losses on the forward process.

Clean latents are noised, and policies predict for the same noise. A module of such a loss has `loss(sample, config) ->
(per-sample loss, metrics)`, the names `METRICS` of its metrics, and `NEEDS_OLD`: whether it needs an old policy even
with one update per rollout. Other losses then use the current policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Metrics = dict[str, Tensor]


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
    """

    latents: Tensor
    noisy_latents: Tensor
    target: Tensor
    sigmas: Tensor
    advantages: Tensor
    model_pred: Tensor
    old_pred: Tensor | None = None


def matching_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """Return e (B,), the mean squared error over all dimensions but the first, in float32."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


def proximal_loss(model_pred: Tensor, other_pred: Tensor) -> Tensor:
    """Return the mean squared distance (B,) of two predictions for the same input.

    No gradient passes through `other_pred`. Up to a weight, the distance is the KL divergence of the two policies'
    path measures.
    """
    return matching_error(model_pred, other_pred.detach())


def lag_decay(update: int, *, ramp: float, maximum: float) -> float:
    """Return the lagged policy's decay min(maximum, ramp * update); `update` counts from 1."""
    return min(maximum, ramp * update)
