"""Advantage Weighted Matching: policy gradient on the pretraining loss (Xue et al. 2025).

With x_t = (1 - t) x_0 + t eps and e(v) = mean over dimensions of (v - (eps - x_0))^2, the surrogate log-likelihood of
an image at t is l = -w(e, t). The policy-gradient loss is PPO's on rho = exp(l - l_old): on policy rho = 1, and its
gradient is A times the (weighted) flow-matching gradient. Two proximal terms bound the policy: the squared distances
of its prediction to the reference (adapters off) and to a lagged copy of itself.

The paper's form is weight "uniform"; the released code's is "ghuber" with power 0.25.
"""

from __future__ import annotations

from torch import Tensor

from diffalign.algorithms import surrogate
from diffalign.algorithms.advantages import clip_advantages
from diffalign.algorithms.forward_process import (
    ForwardLoss,
    ForwardSample,
    Metrics,
    matching_error,
)
from diffalign.config import AWMConfig

HUBER_EPSILON = 1e-10


def log_likelihood(error: Tensor, sigmas: Tensor, *, weight: str, power: float = 0.25) -> Tensor:
    """Return the surrogate log-likelihood l (B,) of each sample at its noise level.

    Args:
        error: errors e (B,) of `matching_error`.
        sigmas: noise levels t (B,) in 0..1.
        weight: "uniform" -e; "t" -t e; "t2" -t^2 e; "huber" -t (sqrt(e + d) - sqrt(d)); "ghuber" -(t / p) ((e + d)^p -
            d^p), with d = 1e-10.
        power: exponent p of "ghuber".

    Raises:
        ValueError: unknown `weight`.
    """
    d = HUBER_EPSILON
    if weight == "uniform":
        return -error
    if weight == "t":
        return -sigmas * error
    if weight == "t2":
        return -sigmas.square() * error
    if weight == "huber":
        root: float = d**0.5
        return -sigmas * ((error + d).sqrt() - root)
    if weight == "ghuber":
        least: float = d**power
        return -sigmas / power * ((error + d).pow(power) - least)
    raise ValueError(f"Unknown weight {weight!r}.")


def awm_loss(
    model_pred: Tensor,
    target: Tensor,
    sigmas: Tensor,
    advantages: Tensor,
    *,
    config: AWMConfig,
    old_log_likelihood: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the clipped policy-gradient loss, one value per sample.

    Args:
        model_pred: predictions (B, ...).
        target: eps - x_0 (B, ...) for the same noise.
        sigmas: noise levels (B,) in 0..1.
        advantages: advantages (B,), already clipped and scaled.
        config: settings of the loss.
        old_log_likelihood: l (B,) under the policy that generated the images, for the same noise; None if that is the
            current policy, which needs no second forward.

    Returns:
        Loss (B,) max(-A rho, -A clip(rho, 1 - c, 1 + c)) and the metrics `ratio`, `clipped`, `error`, each (B,).
    """
    error = matching_error(model_pred, target)
    likelihood = log_likelihood(
        error, sigmas.float(), weight=config.weight, power=config.ghuber_power
    )
    old = likelihood if old_log_likelihood is None else old_log_likelihood
    loss, metrics = surrogate.clipped_surrogate(
        likelihood - old.detach(), advantages, clip_range=config.clip_range
    )
    metrics["error"] = error.detach()
    return loss, metrics


def loss(sample: ForwardSample, config: AWMConfig) -> tuple[Tensor, Metrics]:
    """Return `awm_loss` of a forward sample, with the old policy's predictions if it has any."""
    old = None
    if sample.old_pred is not None:
        old = log_likelihood(
            matching_error(sample.old_pred, sample.target),
            sample.sigmas,
            weight=config.weight,
            power=config.ghuber_power,
        )
    return awm_loss(
        sample.model_pred,
        sample.target,
        sample.sigmas,
        clip_advantages(
            sample.advantages, clip=config.advantage_clip, maximum=config.advantage_max
        ),
        config=config,
        old_log_likelihood=old,
    )


LOSS = ForwardLoss(loss, metrics=(*surrogate.METRICS, "error"))
