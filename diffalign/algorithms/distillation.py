"""Few-step students of a teacher's trajectories: their inputs and their targets.

Both losses are regressions on the teacher's own probability-flow ODE, so they need neither data nor a discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.paths import Path, VariancePreserving, expand

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""Timestep scaling of diffusers' LCMScheduler."""


@dataclass(frozen=True)
class Chords:
    """Points on straight lines between two states of a trajectory.

    Attributes:
        noisy_latents: points (B, ...) on the lines.
        timesteps: their timesteps (B,).
        slope: slopes (B, ...) of the lines in the coordinates of `paths.Path.ode`.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    slope: Tensor


def chords(
    path: Path, start: Tensor, end: Tensor, start_at: Tensor, end_at: Tensor, share: Tensor
) -> Chords:
    """Return the point of each line after a share of its timesteps.

    A student that is right along every such line takes the whole window in one Euler step (piecewise rectified flow:
    Yan et al. 2024, eq. 6; with one window reflow: Liu et al. 2022).

    Args:
        path: path of the noise.
        start: states (B, ...) at `start_at`.
        end: states (B, ...) at `end_at`.
        start_at: first timesteps (B,).
        end_at: last timesteps (B,).
        share: shares (B,) of the timesteps from `start_at` to `end_at`.
    """
    timesteps = start_at + share * (end_at - start_at)
    first, middle, last = (path.ode_time(t) for t in (start_at, timesteps, end_at))
    a, b = path.to_ode(start, start_at), path.to_ode(end, end_at)
    slope = (b - a) / expand(last - first, a)
    state = a + expand(middle - first, a) * slope
    return Chords(path.from_ode(state, timesteps), timesteps, slope)


def reflow_loss(path: Path, model_pred: Tensor, points: Chords) -> Tensor:
    """Return the mean squared error (B,) of the slope that a prediction (B, ...) implies."""
    slope = path.ode(model_pred.float(), points.noisy_latents, points.timesteps).field
    return (slope - points.slope).square().flatten(1).mean(1)


def consistency_output(
    path: Path, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor
) -> Tensor:
    """Return clean latents f(x, t) (B, ...) of a consistency model.

    The function is the identity at the clean end. On a variance-preserving path it has the boundary coefficients of
    diffusers' LCMScheduler (Luo et al. 2023, eq. 9); for a flow x - t v is the identity there by itself.
    """
    clean = path.predict_latents(model_pred.float(), noisy_latents, timesteps)
    if not isinstance(path, VariancePreserving):
        return clean
    scaled = timesteps.float() * TIMESTEP_SCALING
    skip = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
    out = scaled / (scaled.square() + SIGMA_DATA**2).sqrt()
    return expand(skip, clean) * noisy_latents + expand(out, clean) * clean


def pseudo_huber(prediction: Tensor, target: Tensor, *, c: float) -> Tensor:
    """Return the pseudo-Huber distance (B,): the mean of sqrt(d^2 + c^2) - c over (B, ...).

    It lies between square and absolute distance (Song & Dhariwal 2023; LCM's default with c = 0.001).
    """
    distance = ((prediction - target).square() + c * c).sqrt() - c
    return distance.flatten(1).mean(1)


def subdivide(timesteps: Tensor, parts: int) -> Tensor:
    """Cut every interval of a falling grid (N + 1,) into `parts` equal ones: (N * parts + 1,)."""
    share = torch.arange(parts, dtype=timesteps.dtype) / parts
    fine = timesteps[:-1, None] + share * (timesteps[1:] - timesteps[:-1])[:, None]
    return torch.cat([fine.flatten(), timesteps[-1:]])
