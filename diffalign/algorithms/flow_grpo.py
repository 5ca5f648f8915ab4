"""Flow-GRPO: policy gradient on the steps of a stochastic sampler (Liu et al. 2025).

An ODE has no likelihoods, so some steps of the rollout are made stochastic: x' ~ N(mu, std^2) with the marginals of
the ODE. There are two dynamics:

- "sde" (Flow-GRPO, eq. 9): mu = x (1 - s^2 D / 2t) - v (1 + s^2 (1 - t) / 2t) D, std = s sqrt(D), with s = a sqrt(t /
  (1 - t)), where t = 1 in the denominator is replaced by t';
- "cps", coefficients-preserving: mu = (1 - t') x0 + sqrt(t'^2 - n^2) eps, std = n = t' sin(a pi / 2), with x0 and eps
  as the prediction implies them. The sigma after the step is exactly t' for every a.

Here t and t' = t - D are the sigmas before and after the step. All log-probabilities are means over dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.algorithms.advantages import clip_advantages
from diffalign.algorithms.forward_process import Metrics, matching_error, proximal_loss
from diffalign.algorithms.surrogate import METRICS, clipped_surrogate
from diffalign.algorithms.trajectory import StochasticStep, TrajectoryLoss, TrajectorySample
from diffalign.config import FlowGRPOConfig
from diffalign.diffusion.paths import RectifiedFlow, expand

PATH = RectifiedFlow()


def stochastic_step(
    model_pred: Tensor,
    latents: Tensor,
    sigmas: Tensor,
    next_sigmas: Tensor,
    *,
    noise_level: float,
    dynamics: str = "sde",
) -> StochasticStep:
    """Return the distribution of the latents after one step, in float32.

    Args:
        model_pred: velocities v (B, ...).
        latents: latents x (B, ...).
        sigmas: t (B,) in 0..1.
        next_sigmas: t' (B,) in 0..1, below t.
        noise_level: a.
        dynamics: "sde" or "cps".

    Raises:
        ValueError: unknown dynamics.
    """
    x, v = latents.float(), model_pred.float()
    t, after = sigmas.float(), next_sigmas.float()
    if dynamics == "cps":
        std = after * math.sin(noise_level * math.pi / 2)
        times = PATH.timesteps(t)
        x0 = PATH.predict_latents(v, x, times)
        noise = PATH.predict_noise(v, x, times)
        noise_share = (after.square() - std.square()).clamp(min=0).sqrt()
        return StochasticStep(
            (1 - expand(after, x)) * x0 + expand(noise_share, x) * noise, std, std
        )
    if dynamics != "sde":
        raise ValueError(f"Unknown dynamics {dynamics!r}.")
    delta = t - after
    s = noise_level * (t / (1 - torch.where(t < 1, t, after))).sqrt()
    drift = s.square() / (2 * t)
    mean = x * expand(1 - drift * delta, x) - v * expand((1 + drift * (1 - t)) * delta, x)
    return StochasticStep(mean, s * delta.sqrt(), s)


def log_prob(sample: Tensor, step: StochasticStep, *, dynamics: str = "sde") -> Tensor:
    """Return the log-probability (B,) of x', a mean over dimensions.

    For "cps" constants are left out, as in that release.
    """
    square = matching_error(step.mean, sample.detach())
    if dynamics == "cps":
        return -square
    variance = step.std.square()
    return -square / (2 * variance) - step.std.log() - 0.5 * math.log(2 * math.pi)


def log_ratio(
    log_probs: Tensor, old_log_probs: Tensor, *, step: StochasticStep, old_mean: Tensor | None
) -> Tensor:
    """Return the logarithm (B,) of the policy ratio.

    With `old_mean` it is GRPO-Guard's for the SDE: its expectation under the old policy is 0 at any distance, and it
    is not divided by the step's std.
    """
    difference = log_probs - old_log_probs
    if old_mean is None:
        return difference
    return difference * step.std + matching_error(step.mean, old_mean) / (2 * step.std)


def reference_distance(step: StochasticStep, reference: StochasticStep) -> Tensor:
    """Return |mu - mu_ref|^2 / 2 s^2 (B,), a mean over dimensions.

    It is the KL divergence of the steps times D, as in the release.
    """
    return proximal_loss(step.mean, reference.mean) / (2 * step.diffusion.square())


def loss(sample: TrajectorySample, config: FlowGRPOConfig) -> tuple[Tensor, Metrics]:
    """Return PPO's clipped loss (B,) of the steps' likelihood ratios, and its metrics."""
    ratios = log_ratio(
        sample.log_probs, sample.old_log_probs, step=sample.step, old_mean=sample.old_mean
    )
    clip = config.advantage_clip
    advantages = clip_advantages(sample.advantages, clip=clip, maximum=clip)
    return clipped_surrogate(ratios, advantages, clip_range=config.clip_range)


LOSS = TrajectoryLoss(loss, metrics=METRICS)
