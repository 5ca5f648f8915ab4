"""Probability paths: how clean latents become noise, and what the model predicts. The only place that converts time.

Conventions are diffusers': `timesteps` run from 0 (clean) to `num_train_timesteps` (noise) on the scheduler's scale,
`sigmas` from 0 to 1. Both are (B,) tensors; latents have any shape that starts with B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_NOISE = 0.05
"""Share below which there is next to no noise."""
MIN_SIGNAL = 2.0**-12
"""Least share of clean latents that anything is divided by: its square is what diffusers' samplers put in place of a
zero terminal signal-to-noise ratio."""


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, ..., 1) with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Ode:
    """A path's probability-flow ODE where its field is the slope itself: d `state` (B, ...) / d `time` (B,) = `field`
    (B, ...)."""

    state: Tensor
    time: Tensor
    field: Tensor


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

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect model would predict on average."""
        return noise - latents

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the clean latents and of the noise, each (B,) float32."""
        sigmas = self.sigmas(timesteps)
        return 1 - sigmas, sigmas

    def ode(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Ode:
        """The flow is its own coordinate: dx / dt = v."""
        return Ode(noisy_latents, self.ode_time(timesteps), model_pred)

    def ode_time(self, timesteps: Tensor) -> Tensor:
        """Time of `ode` (B,)."""
        return self.sigmas(timesteps)

    def to_ode(self, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The state of `ode` that noisy latents are."""
        return noisy_latents

    def from_ode(self, state: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents of a state of `ode`."""
        return state

    def predict_latents(
        self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor
    ) -> Tensor:
        """The clean latents that a prediction implies: x_0 = x_t - t v."""
        return noisy_latents - expand(self.sigmas(timesteps), noisy_latents) * model_pred

    def predict_noise(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction implies: eps = x_t + (1 - t) v."""
        return noisy_latents + (1 - expand(self.sigmas(timesteps), noisy_latents)) * model_pred


@dataclass(frozen=True)
class VariancePreserving:
    """x_t = a_t x_0 + s_t eps with a^2 + s^2 = 1; the model predicts eps ("epsilon") or a eps - s x_0 ("v_prediction").

    The path of SD1.5 and SDXL (Ho et al. 2020; Salimans & Ho 2022). `alphas_cumprod` (T,) are a^2 at the timesteps
    0 .. T - 1 of a diffusers scheduler; between them a^2 is interpolated. With a zero terminal signal-to-noise ratio
    (Lin et al. 2024) a is 0 at the last of them; whatever is divided by a there is divided by MIN_SIGNAL.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"unknown prediction type {self.prediction_type!r}")

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a and s, each (B,) float32."""
        table = self.alphas_cumprod.float().to(timesteps.device)
        place = timesteps.float().clamp(0, len(table) - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        square = table[low] + (place - low) * (table[high] - table[low])
        return square.sqrt(), (1 - square).sqrt()

    def signal(self, timesteps: Tensor) -> Tensor:
        """a (B,) float32 as a divisor: MIN_SIGNAL at least."""
        return self.scales(timesteps)[0].clamp_min(MIN_SIGNAL)

    def is_noise(self, timesteps: Tensor) -> Tensor:
        """(B,) whether nothing is left of the clean latents."""
        return self.scales(timesteps)[0] <= MIN_SIGNAL

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at `timesteps` (B,)."""
        a, s = (expand(x, latents) for x in self.scales(timesteps))
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect model would predict on average."""
        if self.prediction_type == "epsilon":
            return noise
        a, s = (expand(x, latents) for x in self.scales(timesteps))
        return a * noise - s * latents

    def predict_latents(
        self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor
    ) -> Tensor:
        """The clean latents that a prediction implies: (x_t - s eps) / a, or a x_t - s v."""
        a, s = (expand(x, noisy_latents) for x in self.scales(timesteps))
        if self.prediction_type == "epsilon":
            return (noisy_latents - s * model_pred) / a.clamp_min(MIN_SIGNAL)
        return a * noisy_latents - s * model_pred

    def predict_noise(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction implies: itself, or s x_t + a v."""
        if self.prediction_type == "epsilon":
            return model_pred
        a, s = (expand(x, noisy_latents) for x in self.scales(timesteps))
        return s * noisy_latents + a * model_pred

    def ode(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Ode:
        """d(x / a) / d(s / a) = eps (Song et al. 2021, eq. 14)."""
        noise = self.predict_noise(model_pred, noisy_latents, timesteps)
        return Ode(self.to_ode(noisy_latents, timesteps), self.ode_time(timesteps), noise)

    def ode_time(self, timesteps: Tensor) -> Tensor:
        """Time of `ode` (B,)."""
        return self.scales(timesteps)[1] / self.signal(timesteps)

    def to_ode(self, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The state of `ode` that noisy latents are."""
        return noisy_latents / expand(self.signal(timesteps), noisy_latents)

    def from_ode(self, state: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents of a state of `ode`."""
        return state * expand(self.signal(timesteps), state)


Path = RectifiedFlow | VariancePreserving


def implied_noise(path: Path, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """The noise with which `add_noise` would have made `noisy_latents` of `latents`: (x_t - a x_0) / s."""
    a, s = (expand(x, latents) for x in path.scales(timesteps))
    return (noisy_latents - a * latents) / s


def chord_target(path: Path, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """What leads from noisy latents straight to `latents` (B, ...): the target of the noise that they imply."""
    noise = implied_noise(path, latents, noisy_latents, timesteps)
    return path.target(latents, noise, timesteps)


def way_to_go(noise: Tensor) -> Tensor:
    """(N,) bool, of the shares of noise (N,) at a sampler's falling timesteps: whether noise is left a step later. From
    the other states it is the model's own prediction that leads straight to the image."""
    return torch.cat([noise[1:], noise.new_zeros(1)]) >= MIN_NOISE


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Resolution-dependent shift of SD3 (Esser et al. 2024, eq. 23): shift > 1 moves time towards noise."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def logit_normal_sigmas(
    n: int, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """(n,) sigmas in 0..1 whose logit is normal: SD3's density for training."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def training_timesteps(
    path: Path, n: int, *, mean: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return (n,) timesteps as models on this path are pretrained: SD3's density for flows, uniform otherwise.

    `mean` shifts the density of a flow: above 0 towards noise.
    """
    if isinstance(path, RectifiedFlow):
        return path.timesteps(logit_normal_sigmas(n, mean=mean, generator=generator))
    return torch.randint(path.num_train_timesteps, (n,), generator=generator)
