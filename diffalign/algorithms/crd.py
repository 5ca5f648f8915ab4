"""CRD: centered reward distillation on the forward process (Zhu et al. 2026, arXiv 2603.14128).

The implicit reward of an image is how much better than the old policy the policy predicts it: r = -(e / w - e_old /
w_old), with e the mean squared error of a prediction and w its mean absolute error, held fixed. An image's advantage
becomes its optimality a in 0..1. Within a group beta r and a are both centred, so that what all images of a prompt have
in common is not distilled, and the loss is (advantage clip / beta) (beta r - a - mean of the group)^2. The release's
code centres over the batch; here the mean is that of the prompt's images, of the whole update.

Rollouts come from a policy of their own, which follows the current one at first and lags behind it later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.algorithms.advantages import optimality
from diffalign.algorithms.forward_process import (
    ForwardLoss,
    ForwardSample,
    GroupStatistic,
    Metrics,
    matching_error,
)
from diffalign.config.algorithms import CRDConfig

ERROR_FLOOR = 1e-5


def weighted_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """Return e / w (B,): the mean squared error over the mean absolute error, which has no gradient."""
    gap = (model_pred.float() - target.float()).detach().abs().flatten(1).mean(1)
    return matching_error(model_pred, target) / gap.clamp(min=ERROR_FLOOR)


def implicit_reward(sample: ForwardSample) -> Tensor:
    """Return r (B,).

    Raises:
        ValueError: the sample has no prediction of the old policy.
    """
    if sample.old_pred is None:
        raise ValueError("CRD needs the prediction of the old policy.")
    old = weighted_error(sample.old_pred.detach(), sample.target)
    return old - weighted_error(sample.model_pred, sample.target)


def gap(sample: ForwardSample, config: CRDConfig) -> Tensor:
    """Return beta r - a (B,), whose mean over a group is subtracted from it."""
    share = optimality(sample.advantages, clip=config.advantage_clip)
    return config.beta * implicit_reward(sample) - share


def loss(sample: ForwardSample, config: CRDConfig) -> tuple[Tensor, Metrics]:
    """Return the loss (B,) and its metrics.

    The loss is (advantage clip / beta) (beta r - a - mean of the group)^2. The metrics are `implicit_reward`,
    `optimality` and `error`, each (B,).

    Raises:
        ValueError: the sample has no prediction of the old policy, or no group mean.
    """
    if sample.group_mean is None:
        raise ValueError("CRD needs the mean over the images of a prompt.")
    reward = implicit_reward(sample)
    share = optimality(sample.advantages, clip=config.advantage_clip)
    centred = config.beta * reward - share - sample.group_mean.detach()
    value = config.advantage_clip / config.beta * centred.square()
    with torch.no_grad():
        error = matching_error(sample.model_pred, sample.target)
    return value, {"implicit_reward": reward.detach(), "optimality": share, "error": error}


LOSS = ForwardLoss(
    loss,
    metrics=("implicit_reward", "optimality", "error"),
    needs_old=True,
    own_sampler=True,
    group=GroupStatistic(gap, needs_old=True),
)
