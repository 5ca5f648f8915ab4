"""What losses on the forward process share: clean latents are noised, and policies predict for the same noise.

A module of such a loss has `loss(sample, config) -> (per-sample loss, metrics)`, the names of its `METRICS`, and
`NEEDS_OLD`: whether it is about an old policy even when that has just made one update.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class ForwardSample:
    """B noisy latents and what is known of them.

    `latents`, `noisy_latents`, `target`, `model_pred` (B, C, H, W); `sigmas` (B,) in 0..1; `advantages` (B,), neither
    clipped nor scaled; `old_pred` (B, C, H, W), prediction of the policy that made the images, None where that is the
    current one.
    """

    latents: Tensor
    noisy_latents: Tensor
    target: Tensor
    sigmas: Tensor
    advantages: Tensor
    model_pred: Tensor
    old_pred: Tensor | None = None


def matching_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """e, (B,): mean squared error over all dimensions but the first, in float32."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


def proximal_loss(model_pred: Tensor, other_pred: Tensor) -> Tensor:
    """(B,) mean squared distance of two predictions for the same input; the other one is held fixed.

    Up to a weight, the KL divergence of the two policies' path measures.
    """
    return matching_error(model_pred, other_pred.detach())


def lag_decay(update: int, *, ramp: float, maximum: float) -> float:
    """Decay of the lagged policy after update number `update` (from 1): min(maximum, ramp * update)."""
    return min(maximum, ramp * update)
