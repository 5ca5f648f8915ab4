"""Probability paths: how clean latents become noise, and what the model predicts. The only place that converts time.

Conventions are diffusers': `timesteps` run from 0 (clean) to `num_train_timesteps` (noise) on the scheduler's scale,
`sigmas` from 0 to 1. Both are (B,) tensors; latents have any shape that starts with B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, ..., 1) with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x_0 + t eps; the model predicts the velocity eps - x_0.

    The path of SD3, FLUX and SANA. (Liu et al. 2022; Esser et al. 2024, eq. 13)
    """

    num_train_timesteps: int = 1000

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Scheduler scale to 0..1, in float32."""
        return timesteps.float() / self.num_train_timesteps

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """0..1 to scheduler scale, in float32."""
        return sigmas.float() * self.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at `timesteps` (B,)."""
        sigmas = expand(self.sigmas(timesteps), latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What a perfect model would predict on average."""
        return noise - latents

    def predict_latents(
        self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor
    ) -> Tensor:
        """The clean latents that a prediction implies: x_0 = x_t - t v."""
        return noisy_latents - expand(self.sigmas(timesteps), noisy_latents) * model_pred

    def predict_noise(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction implies: eps = x_t + (1 - t) v."""
        return noisy_latents + (1 - expand(self.sigmas(timesteps), noisy_latents)) * model_pred


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Resolution-dependent shift of SD3 (Esser et al. 2024, eq. 23): shift > 1 moves time towards noise."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def logit_normal_sigmas(
    n: int, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """(n,) sigmas in 0..1 whose logit is normal: SD3's density for training."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))
