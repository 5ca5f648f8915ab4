"""Losses on preferences: which of two images is wanted, told by how well a policy predicts each beside the reference.

All of them see the same numbers: e, the mean squared error of a prediction against its target (`matching_error`), of
winner and loser, of policy and reference at the same noisy latents. Delta = e - e_ref, and an image's implicit reward
is -beta Delta / 2 (Wallace et al. 2024, eq. 14, T folded into beta). beta acts on a mean over the D numbers of a
latent: on their sum it is beta / D, so a value does not carry over to another resolution or another kind of target.

What the target is, random noise (Diffusion-DPO) or the noise that an inversion implies (Inversion-DPO), is no matter of
this file.
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
    """e of B pairs, each (B,): of the policy, with gradient, and of the reference, held fixed."""

    winner: Tensor
    loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor

    @property
    def gap(self) -> Tensor:
        """Delta_w - Delta_l (B,): below 0 where the policy has moved towards the winner."""
        winner = self.winner - self.reference_winner.detach()
        loser = self.loser - self.reference_loser.detach()
        return winner - loser

    def margin(self, beta: float) -> Tensor:
        """m (B,): the winner's implicit reward less the loser's."""
        return -beta / 2 * self.gap

    def metrics(self, beta: float) -> Metrics:
        """Return what tells progress where the loss does not, each (B,): both errors, the margin, the accuracy.

        `accuracy` is 1 where the winner is ahead and 0.5 for a tie, as in diffusers' train_diffusion_dpo.py.
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


def pair_loss(
    errors: PairErrors, preference: Tensor, *, beta: float, loss_type: str = "sigmoid"
) -> Tensor:
    """(B,) loss of pairs.

    Args:
        errors: of winner and loser.
        preference: (B,) probability p in 0..1 that the one called winner is: 1 for a clear vote.
        beta: strength, see above.
        loss_type: "sigmoid" -p log sigma(m) - (1 - p) log sigma(-m), Diffusion-DPO with soft labels; "ipo" the square
            of Delta_l - Delta_w - (2 p - 1) / 2 beta (Azar et al. 2024), bounded margins; "hinge" max(0, 1 - m),
            weighted likewise; "dmpo" KL(sigma(m) || 1 - alpha) with alpha = 0.01, the reverse divergence.
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
    raise ValueError(f"unknown loss type {loss_type!r}; known are {', '.join(LOSS_TYPES)}")


def _reverse_kl(m: Tensor) -> Tensor:
    """KL of Bernoulli(sigma(m)) from Bernoulli(1 - alpha)."""
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
    """SDPO's lambda (B,) in 0..1: what the gradient of the loser's error is multiplied with so that, to first order in
    the predictions, the winner's error falls by at least `mu` of what it would without a loser. (Diffusion-SDPO, 2025;
    there one lambda a batch, here one a pair.)

    The gradients are those of the errors with respect to the predictions, compared element by element: both images of a
    pair share their timestep.
    """
    with torch.no_grad():
        winner = (winner_pred - winner_target).float().flatten(1)
        loser = (loser_pred - loser_target).float().flatten(1)
        together = (winner * loser).sum(1)
        allowed = (1 - mu) * winner.square().sum(1) / together.clamp_min(1e-30)
        return torch.where(together > 0, allowed.clamp(max=1.0), torch.ones_like(allowed))


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """`value`, its gradient multiplied with `factor`."""
    held = value.detach()
    return held + factor.detach() * (value - held)


def kto_loss(
    error: Tensor, reference_error: Tensor, wanted: Tensor, *, beta: float, baseline: Tensor
) -> Tensor:
    """(B,) 1 - sigma(s (beta (g - z))) with g = -Delta, s = 1 for `wanted` images and -1 for others: unpaired votes
    (Li et al. 2024; Ethayarajh et al. 2024). `baseline` is z = max(0, mean of g over the whole batch), held fixed."""
    gain = reference_error.detach() - error
    sign = wanted.to(gain.dtype) * 2 - 1
    return 1 - (sign * beta * (gain - baseline.detach())).sigmoid()


def mapo_loss(error_winner: Tensor, error_loser: Tensor, *, beta: float) -> Tensor:
    """(B,) e_w - beta log sigma(T (phi(e_w) - phi(e_l))): no reference (Hong et al. 2024)."""
    difference = _mapo_reward(error_winner) - _mapo_reward(error_loser)
    return error_winner - beta * F.logsigmoid(MAPO_STEPS * difference)


def _mapo_reward(error: Tensor) -> Tensor:
    """phi(e) = s e / (exp(s e) - 1): 1 at 0, falling."""
    x = MAPO_SCALE * error
    small = 1 - x / 2 + x.square() / 12
    safe = torch.where(x < 1e-3, torch.ones_like(x), x)
    return torch.where(x < 1e-3, small, safe / torch.expm1(safe))
