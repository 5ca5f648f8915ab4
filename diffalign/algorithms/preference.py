"""Losses on preferences: a policy learns from pairs which of two images is preferred.

All losses use the mean squared error e of a prediction against its target (`matching_error`), for winner and loser,
and for policy and reference at the same noisy latents. With Delta = e - e_ref, an image's implicit reward is -beta
Delta / 2 (Wallace et al. 2024, eq. 14, T folded into beta). beta acts on a mean over the D numbers of a latent: on
their sum it would be beta / D, so a value does not carry over to another resolution or another kind of target.

The losses do not depend on the kind of target: random noise (Diffusion-DPO), or the noise that an inversion implies
(Inversion-DPO).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.algorithms.forward_process import Metrics

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "dmpo")
DMPO_ALPHA = 0.01
MAPO_SCALE, MAPO_STEPS = 0.5, 1000.0


@dataclass(frozen=True)
class PairErrors:
    """Errors e of B pairs, each (B,), of the policy and of the reference.

    No gradient passes through the reference's errors.
    """

    winner: Tensor
    loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor

    @property
    def gap(self) -> Tensor:
        """Difference Delta_w - Delta_l (B,), negative where the policy has moved towards the winner."""
        winner = self.winner - self.reference_winner.detach()
        loser = self.loser - self.reference_loser.detach()
        return winner - loser

    def margin(self, beta: float) -> Tensor:
        """Return the margin m (B,): the winner's implicit reward minus the loser's."""
        return -beta / 2 * self.gap

    def metrics(self, beta: float) -> Metrics:
        """Return metrics (B,) of progress: errors, margin and accuracy.

        The metric `accuracy` is 1 where the winner is ahead and 0.5 for a tie, as in diffusers'
        train_diffusion_dpo.py.
        """
        with torch.no_grad():
            margin = self.margin(beta)
            return {
                "error_winner": self.winner.detach(),
                "error_loser": self.loser.detach(),
                "error_winner_reference": self.reference_winner,
                "error_loser_reference": self.reference_loser,
                "margin": margin,
                "accuracy": (margin > 0).float() + (margin == 0).float() / 2,
            }


def masked_error(model_pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return mean squared errors (...) over the last three dimensions (C, H, W).

    With a mask they are weighted means, so that the size of the masked part does not count.

    Args:
        model_pred: predictions (..., C, H, W).
        target: targets (..., C, H, W).
        mask: weights (..., 1, H, W) of the places, broadcast to the predictions; None for the plain mean.
    """
    gap = (model_pred - target).square()
    if mask is None:
        return gap.flatten(-3).mean(-1)
    weighted = (gap * mask).flatten(-3).sum(-1)
    return weighted / (mask.flatten(-3).sum(-1) * gap.shape[-3])


def automatic_beta(gain: float, *, most: float, target: float) -> float:
    """Return the beta at which the loss has a gradient factor of `target`.

    The factor of the sigmoid loss is sigma(-beta g) with g the margin at beta = 1. It is 1/2 at the reference and falls
    as the policy learns, until pairs teach nothing more. The result solves sigma(-beta g) = target, and is `most` where
    that needs a larger beta, as in the beginning.

    Args:
        gain: running mean of g.
        most: largest beta.
        target: gradient factor between 0 and 1/2.
    """
    if gain <= 0:
        return most
    return min(most, math.log((1 - target) / target) / gain)


def pair_loss(
    errors: PairErrors, preference: Tensor, *, beta: float, loss_type: str = "sigmoid"
) -> Tensor:
    """Return the loss (B,) of pairs.

    Args:
        errors: errors of winner and loser.
        preference: probabilities p (B,) in 0..1 that the image called winner is preferred; 1 for a clear vote.
        beta: strength, see the module.
        loss_type: "sigmoid" -p log sigma(m) - (1 - p) log sigma(-m), Diffusion-DPO with soft labels; "ipo" the square
            of Delta_l - Delta_w - (2 p - 1) / 2 beta (Azar et al. 2024), bounded margins; "hinge" max(0, 1 - m),
            weighted likewise; "dmpo" KL(sigma(m) || 1 - alpha) with alpha = 0.01, the reverse divergence.

    Raises:
        ValueError: unknown `loss_type`.
    """
    m, p = errors.margin(beta), preference.float()
    if loss_type == "sigmoid":
        return -p * F.logsigmoid(m) - (1 - p) * F.logsigmoid(-m)
    if loss_type == "ipo":
        return (-errors.gap - (2 * p - 1) / (2 * beta)).square()
    if loss_type == "hinge":
        return p * (1 - m).relu() + (1 - p) * (1 + m).relu()
    if loss_type == "dmpo":
        return p * _reverse_kl(m) + (1 - p) * _reverse_kl(-m)
    raise ValueError(f"Unknown loss type {loss_type!r}. Choose from {', '.join(LOSS_TYPES)}.")


def _reverse_kl(m: Tensor) -> Tensor:
    """Return the KL divergence of Bernoulli(sigma(m)) from Bernoulli(1 - alpha)."""
    probability = m.sigmoid()
    yes = probability * (F.logsigmoid(m) - math.log(1 - DMPO_ALPHA))
    no = (1 - probability) * (F.logsigmoid(-m) - math.log(DMPO_ALPHA))
    return yes + no


def safeguard(
    winner_pred: Tensor,
    winner_target: Tensor,
    loser_pred: Tensor,
    loser_target: Tensor,
    *,
    mu: float,
) -> Tensor:
    """Return SDPO's lambda (B,) in 0..1, a factor for the gradient of the loser's error.

    To first order in the predictions, the winner's error then falls by at least `mu` of what it would without a loser
    (Diffusion-SDPO, 2025, which has one lambda per batch). The gradients of the errors with respect to the predictions
    are compared element by element; both images of a pair share their timestep.
    """
    with torch.no_grad():
        winner = (winner_pred - winner_target).float().flatten(1)
        loser = (loser_pred - loser_target).float().flatten(1)
        together = (winner * loser).sum(1)
        allowed = (1 - mu) * winner.square().sum(1) / together.clamp_min(1e-30)
        return torch.where(together > 0, allowed.clamp(max=1.0), torch.ones_like(allowed))


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """Return `value` with its gradient multiplied by `factor`."""
    constant = value.detach()
    return constant + factor.detach() * (value - constant)


def kto_loss(
    error: Tensor, reference_error: Tensor, preferred: Tensor, *, beta: float, baseline: Tensor
) -> Tensor:
    """Return KTO's loss (B,) of unpaired votes.

    It is 1 - sigma(s (beta (g - z))) with g = -Delta, s = 1 for `preferred` images and -1 for others (Li et al. 2024;
    Ethayarajh et al. 2024). No gradient passes through the `baseline` z = max(0, mean of g over the whole batch).
    """
    gain = reference_error.detach() - error
    sign = preferred.to(gain.dtype) * 2 - 1
    return 1 - (sign * beta * (gain - baseline.detach())).sigmoid()


def mapo_loss(error_winner: Tensor, error_loser: Tensor, *, beta: float) -> Tensor:
    """Return MaPO's loss (B,) e_w - beta log sigma(T (phi(e_w) - phi(e_l))).

    It needs no reference (Hong et al. 2024).
    """
    difference = _mapo_reward(error_winner) - _mapo_reward(error_loser)
    return error_winner - beta * F.logsigmoid(MAPO_STEPS * difference)


def _mapo_reward(error: Tensor) -> Tensor:
    """Return phi(e) = s e / (exp(s e) - 1), which falls from 1."""
    x = MAPO_SCALE * error
    small = 1 - x / 2 + x.square() / 12
    safe = torch.where(x < 1e-3, torch.ones_like(x), x)
    return torch.where(x < 1e-3, small, safe / torch.expm1(safe))
