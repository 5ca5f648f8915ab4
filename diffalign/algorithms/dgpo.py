"""DGPO: direct group preference optimization (Luo et al. 2025, arXiv 2510.08425).

A group of images of one prompt is one preference: the images with positive advantages, by their advantages, against
the others. With e the matching error of an image at a timestep and e_ref the reference's, the implicit reward of an
image is -beta (e - e_ref), and the loss of a group of G images is -log sigma(-S) with S = (beta / G) sum A (e - e_ref).
Its gradient with respect to e is that of sigma(S) beta / G A e with S held fixed. The factor beta is left out as in the
release, so that the learning rate does not depend on it. All images of a group share noise and timesteps
(`algorithm.noise: group`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.algorithms.forward_process import (
    ForwardLoss,
    ForwardSample,
    GroupStatistic,
    Metrics,
    matching_error,
)
from diffalign.config.algorithms import DGPOConfig


def advantage(sample: ForwardSample, config: DGPOConfig) -> Tensor:
    """Return the clipped advantages A (B,)."""
    return sample.advantages.clamp(-config.advantage_clip, config.advantage_clip)


def group_values(sample: ForwardSample, config: DGPOConfig) -> Tensor:
    """Return A (e - e_ref) (B,), whose mean over a group is S / beta.

    Raises:
        ValueError: the sample has no prediction of the reference model.
    """
    if sample.reference_pred is None:
        raise ValueError("DGPO needs the prediction of the reference model.")
    error = matching_error(sample.model_pred, sample.target)
    reference_error = matching_error(sample.reference_pred, sample.target)
    return advantage(sample, config) * (error - reference_error)


def loss(sample: ForwardSample, config: DGPOConfig) -> tuple[Tensor, Metrics]:
    """Return sigma(S) max(A e, A e') (B,) with metrics.

    The error e' is e, clipped so that exp(e_old - e') lies in 1 - c ... 1 + c. The maximum therefore has no gradient
    where the policy has moved further than c in the direction of the advantage. The metrics are `group_weight`
    (sigma(S)), `clipped` and `error`, each (B,).

    Raises:
        ValueError: the sample has no group mean.
    """
    if sample.group_mean is None:
        raise ValueError("DGPO needs the mean over the images of a prompt.")
    error = matching_error(sample.model_pred, sample.target)
    old = error.detach()
    if sample.old_pred is not None:
        old = matching_error(sample.old_pred, sample.target).detach()
    c = config.clip_range
    bounded = old - (old - error).clamp(math.log1p(-c), math.log1p(c))
    weight = (config.beta * sample.group_mean.detach()).sigmoid()
    signed = advantage(sample, config)
    value = weight * (signed * error).maximum(signed * bounded)
    with torch.no_grad():
        clipped = (signed * bounded > signed * error).float()
    return value, {"group_weight": weight, "clipped": clipped, "error": error.detach()}


LOSS = ForwardLoss(
    loss,
    metrics=("group_weight", "clipped", "error"),
    group=GroupStatistic(group_values, needs_reference=True),
)
