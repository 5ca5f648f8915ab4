"""DiffusionNFT: negative-aware fine-tuning on the forward process (Zheng et al. 2025).

An image's advantage becomes its optimality r in 0..1. The policy is trained through two implicit policies, one on each
side of the old policy: v+ = (1 - beta) v_old + beta v is fitted to the image with weight r, v- = (1 + beta) v_old -
beta v with weight 1 - r. The loss is convex in v for every r. At v = v_old its gradient is A t / mean|v - v*| times
that of the matching error, so it is AWM's with another weight over time and an additional proximal term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.algorithms.advantages import optimality
from diffalign.algorithms.forward_process import (
    ForwardLoss,
    ForwardSample,
    Metrics,
    matching_error,
)
from diffalign.config import DiffusionNFTConfig
from diffalign.diffusion.paths import expand

NORMALISER_FLOOR = 1e-5


def nft_loss(
    model_pred: Tensor,
    old_pred: Tensor,
    noisy_latents: Tensor,
    latents: Tensor,
    sigmas: Tensor,
    optimality: Tensor,
    *,
    mix: float,
) -> tuple[Tensor, Metrics]:
    """Return the loss of each sample before multiplication with the advantage clip.

    Args:
        model_pred: predictions of the policy (B, ...).
        old_pred: predictions of the old policy (B, ...).
        noisy_latents: noisy latents (B, ...).
        latents: clean latents x_0 (B, ...).
        sigmas: noise levels (B,) in 0..1.
        optimality: r (B,) in 0..1.
        mix: beta.

    Returns:
        Loss (B,) [r |x+ - x_0|^2 / w+ + (1 - r) |x- - x_0|^2 / w-] / beta with w = mean |x - x_0|, without gradient,
            and the metrics `positive` and `negative`, the two terms without their weights, each (B,).
    """
    old = old_pred.detach().float()
    current = model_pred.float()
    t = expand(sigmas.float(), current)

    def term(velocity: Tensor) -> Tensor:
        gap = noisy_latents.float() - t * velocity - latents.float()
        normaliser = gap.detach().abs().flatten(1).mean(1).clamp(min=NORMALISER_FLOOR)
        return gap.square().flatten(1).mean(1) / normaliser

    positive = term((1 - mix) * old + mix * current)
    negative = term((1 + mix) * old - mix * current)
    loss = (optimality * positive + (1 - optimality) * negative) / mix
    return loss, {"positive": positive.detach(), "negative": negative.detach()}


def loss(sample: ForwardSample, config: DiffusionNFTConfig) -> tuple[Tensor, Metrics]:
    """Return `nft_loss` times the advantage clip, as in the release.

    Raises:
        ValueError: the sample has no prediction of the old policy.
    """
    if sample.old_pred is None:
        raise ValueError("DiffusionNFT needs the prediction of the old policy.")
    clip = config.advantage_clip
    share = optimality(sample.advantages, clip=clip)
    value, metrics = nft_loss(
        sample.model_pred,
        sample.old_pred,
        sample.noisy_latents,
        sample.latents,
        sample.sigmas,
        share,
        mix=config.mix,
    )
    with torch.no_grad():
        metrics |= {
            "optimality": share,
            "error": matching_error(sample.model_pred, sample.target),
        }
    return clip * value, metrics


LOSS = ForwardLoss(loss, metrics=("optimality", "positive", "negative", "error"), needs_old=True)
