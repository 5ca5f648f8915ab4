"""Flow-DPPO: a policy gradient that leaves out steps by their divergence (Ping et al. 2026, arXiv 2606.11025).

PPO clips a step by its likelihood ratio, which a single sampled step decides. Flow-DPPO asks how far the distribution
of the step has moved: D = mean over dimensions of (mu - mu_old)^2 / (2 std^2), the KL divergence of two Gaussians of
equal variance over the number of dimensions. A step has no gradient if D has reached a threshold and its ratio has
moved in the direction of the advantage, so that the gradient would increase D further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.algorithms.advantages import clip_advantages
from diffalign.algorithms.forward_process import Metrics, matching_error
from diffalign.algorithms.trajectory import TrajectoryLoss, TrajectorySample
from diffalign.config.algorithms import FlowDPPOConfig


def divergence(sample: TrajectorySample) -> Tensor:
    """Return the divergence D (B,) of each step from the old policy's, without gradient.

    Raises:
        ValueError: the sample has no means of the old policy.
    """
    if sample.old_mean is None:
        raise ValueError("Flow-DPPO needs the means of the policy that sampled the rollout.")
    distance = matching_error(sample.step.mean.detach(), sample.old_mean)
    return distance / (2 * sample.step.std.square())


def loss(sample: TrajectorySample, config: FlowDPPOConfig) -> tuple[Tensor, Metrics]:
    """Return the loss (B,) and its metrics.

    The loss is -A rho, and 0 for steps that are left out. The metrics are `ratio`, `left_out` and `divergence`.
    """
    clip = config.advantage_clip
    advantages = clip_advantages(sample.advantages, clip=clip, maximum=clip)
    ratio = (sample.log_probs - sample.old_log_probs).exp()
    distance = divergence(sample)
    outward = (ratio.detach() - 1) * advantages > 0
    left_out = outward & (distance >= config.divergence_threshold)
    value = torch.where(left_out, torch.zeros_like(ratio), -advantages * ratio)
    return value, {"ratio": ratio.detach(), "left_out": left_out.float(), "divergence": distance}


LOSS = TrajectoryLoss(loss, metrics=("ratio", "left_out", "divergence"))
