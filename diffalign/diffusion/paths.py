"""Probability paths from clean latents to noise, and the predictions of models on them.

Only this module converts time. Conventions are diffusers': `timesteps` run from 0 (clean) to `num_train_timesteps`
(noise) on the scheduler's scale, `sigmas` from 0 to 1. Both are (B,) tensors; latents have any shape that starts with
B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_NOISE = 0.05
"""Share of noise below which latents count as clean."""
MIN_SIGNAL = 2.0**-12
"""Least share of clean latents as a divisor.

Its square is what diffusers' samplers use instead of a zero terminal signal-to-noise ratio.
"""


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1) with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Ode:
    """Probability-flow ODE in coordinates where d state / d time = field.

    Attributes:
        state: states (B, ...).
        time: times (B,).
        field: slopes (B, ...).
    """

    state: Tensor
    time: Tensor
    field: Tensor


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow, the path of SD3, FLUX and SANA.

    The path is x_t = (1 - t) x_0 + t eps. The model predicts the velocity eps - x_0. (Liu et al. 2022; Esser et al.
    2024, eq. 13)
    """

    num_train_timesteps: int = 1000

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Convert timesteps of the scheduler to 0..1, in float32."""
        return timesteps.float() / self.num_train_timesteps

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """Convert 0..1 to timesteps of the scheduler, in float32."""
        return sigmas.float() * self.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents at `timesteps` (B,)."""
        sigmas = expand(self.sigmas(timesteps), latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the model, its optimal prediction on average."""
        return noise - latents

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the clean latents and of the noise, each (B,) float32."""
        sigmas = self.sigmas(timesteps)
        return 1 - sigmas, sigmas

    def ode(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Ode:
        """Return the ODE dx / dt = v; a flow needs no other coordinates."""
        return Ode(noisy_latents, self.ode_time(timesteps), model_pred)

    def ode_time(self, timesteps: Tensor) -> Tensor:
        """Return the time of `ode` (B,)."""
        return self.sigmas(timesteps)

    def to_ode(self, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Convert noisy latents to a state of `ode`."""
        return noisy_latents

    def from_ode(self, state: Tensor, timesteps: Tensor) -> Tensor:
        """Convert a state of `ode` to noisy latents."""
        return state

    def predict_latents(
        self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Return the clean latents that a prediction implies: x_0 = x_t - t v."""
        return noisy_latents - expand(self.sigmas(timesteps), noisy_latents) * model_pred

    def predict_noise(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise that a prediction implies: eps = x_t + (1 - t) v."""
        return noisy_latents + (1 - expand(self.sigmas(timesteps), noisy_latents)) * model_pred


@dataclass(frozen=True)
class VariancePreserving:
    """Variance-preserving path of SD1.5 and SDXL.

    The path is x_t = a_t x_0 + s_t eps with a^2 + s^2 = 1. The model predicts eps ("epsilon") or a eps - s x_0
    ("v_prediction"); see Ho et al. 2020 and Salimans & Ho 2022. The tensor `alphas_cumprod` (T,) holds a^2 at the
    timesteps 0 .. T - 1 of a diffusers scheduler; between them a^2 is interpolated. With a zero terminal
    signal-to-noise ratio (Lin et al. 2024) a is 0 at the last timestep; a division by a is there a division by
    MIN_SIGNAL.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"Unknown prediction type {self.prediction_type!r}.")

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and s, each (B,) float32."""
        table = self.alphas_cumprod.float().to(timesteps.device)
        position = timesteps.float().clamp(0, len(table) - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        square = table[low] + (position - low) * (table[high] - table[low])
        return square.sqrt(), (1 - square).sqrt()

    def signal(self, timesteps: Tensor) -> Tensor:
        """Return a (B,) float32 as a divisor, at least MIN_SIGNAL."""
        return self.scales(timesteps)[0].clamp_min(MIN_SIGNAL)

    def is_noise(self, timesteps: Tensor) -> Tensor:
        """Return whether nothing is left of the clean latents, (B,) bool."""
        return self.scales(timesteps)[0] <= MIN_SIGNAL

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents at `timesteps` (B,)."""
        a, s = (expand(x, latents) for x in self.scales(timesteps))
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the model, its optimal prediction on average."""
        if self.prediction_type == "epsilon":
            return noise
        a, s = (expand(x, latents) for x in self.scales(timesteps))
        return a * noise - s * latents

    def predict_latents(
        self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Return the clean latents that a prediction implies: (x_t - s eps) / a, or a x_t - s v."""
        a, s = (expand(x, noisy_latents) for x in self.scales(timesteps))
        if self.prediction_type == "epsilon":
            return (noisy_latents - s * model_pred) / a.clamp_min(MIN_SIGNAL)
        return a * noisy_latents - s * model_pred

    def predict_noise(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise that a prediction implies: itself, or s x_t + a v."""
        if self.prediction_type == "epsilon":
            return model_pred
        a, s = (expand(x, noisy_latents) for x in self.scales(timesteps))
        return s * noisy_latents + a * model_pred

    def ode(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Ode:
        """Return DDIM's ODE (Song et al. 2021, eq. 14): d(x / a) / d(s / a) = eps."""
        noise = self.predict_noise(model_pred, noisy_latents, timesteps)
        return Ode(self.to_ode(noisy_latents, timesteps), self.ode_time(timesteps), noise)

    def ode_time(self, timesteps: Tensor) -> Tensor:
        """Return the time of `ode` (B,)."""
        return self.scales(timesteps)[1] / self.signal(timesteps)

    def to_ode(self, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Convert noisy latents to a state of `ode`."""
        return noisy_latents / expand(self.signal(timesteps), noisy_latents)

    def from_ode(self, state: Tensor, timesteps: Tensor) -> Tensor:
        """Convert a state of `ode` to noisy latents."""
        return state * expand(self.signal(timesteps), state)


Path = RectifiedFlow | VariancePreserving


def implied_noise(path: Path, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """Return the noise that `add_noise` needs to make `noisy_latents` from `latents`.

    It is (x_t - a x_0) / s.
    """
    a, s = (expand(x, latents) for x in path.scales(timesteps))
    return (noisy_latents - a * latents) / s


def chord_target(path: Path, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """Return the target that maps `noisy_latents` to `latents` in one step.

    It is the target of the noise that the two imply.
    """
    noise = implied_noise(path, latents, noisy_latents, timesteps)
    return path.target(latents, noise, timesteps)


def has_noise_after_step(noise: Tensor) -> Tensor:
    """Return where noise remains after the step, (N,) bool.

    From the remaining states (the last) only the model's own prediction leads to the image; they have no independent
    target.

    Args:
        noise: shares of noise (N,) at a sampler's falling timesteps.
    """
    return torch.cat([noise[1:], noise.new_zeros(1)]) >= MIN_NOISE


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Shift sigmas by resolution as SD3 does (Esser et al. 2024, eq. 23).

    A shift above 1 moves time towards noise.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def logit_normal_sigmas(
    n: int, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw sigmas (n,) in 0..1 whose logit is normal, SD3's density for training."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def training_timesteps(
    path: Path, n: int, *, mean: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw timesteps (n,) as models on this path are pretrained.

    The density is SD3's for flows and uniform otherwise. For a flow `mean` shifts it: above 0 towards noise.
    """
    if isinstance(path, RectifiedFlow):
        return path.timesteps(logit_normal_sigmas(n, mean=mean, generator=generator))
    return torch.randint(path.num_train_timesteps, (n,), generator=generator)
