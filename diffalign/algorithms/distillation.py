"""Few-step students of a teacher's trajectories: what a student sees of one, and what it should say there.

Both losses are regressions on the teacher's own probability-flow ODE, so they need neither data nor a discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.paths import Path, VariancePreserving, expand

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""Of diffusers' LCMScheduler."""


@dataclass(frozen=True)
class Chords:
    """Noisy latents (B, ...) at `timesteps` (B,) on straight lines between two states of a trajectory, and the slope
    (B, ...) of each line in the coordinates of `noise.Path.ode`."""

    noisy_latents: Tensor
    timesteps: Tensor
    slope: Tensor


def chords(
    path: Path, start: Tensor, end: Tensor, start_at: Tensor, end_at: Tensor, share: Tensor
) -> Chords:
    """The point after `share` (B,) of the timesteps from `start_at` to `end_at` (B,), for states `start` and `end`
    (B, ...) there.

    A student that is right along every such line takes the whole window in one Euler step. (Piecewise rectified flow:
    Yan et al. 2024, eq. 6; with one window reflow: Liu et al. 2022.)
    """
    timesteps = start_at + share * (end_at - start_at)
    first, here, last = (path.ode_time(t) for t in (start_at, timesteps, end_at))
    a, b = path.to_ode(start, start_at), path.to_ode(end, end_at)
    slope = (b - a) / expand(last - first, a)
    state = a + expand(here - first, a) * slope
    return Chords(path.from_ode(state, timesteps), timesteps, slope)


def reflow_loss(path: Path, model_pred: Tensor, found: Chords) -> Tensor:
    """(B,) mean squared distance of the slope that a prediction (B, ...) implies."""
    slope = path.ode(model_pred.float(), found.noisy_latents, found.timesteps).field
    return (slope - found.slope).square().flatten(1).mean(1)


def consistency_output(
    path: Path, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor
) -> Tensor:
    """Clean latents (B, ...): f(x, t) of a consistency model, the identity at the clean end.

    On a variance-preserving path with the boundary coefficients of diffusers' LCMScheduler (Luo et al. 2023, eq. 9); a
    flow's x - t v is the identity there by itself.
    """
    clean = path.predict_latents(model_pred.float(), noisy_latents, timesteps)
    if not isinstance(path, VariancePreserving):
        return clean
    scaled = timesteps.float() * TIMESTEP_SCALING
    skip = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
    out = scaled / (scaled.square() + SIGMA_DATA**2).sqrt()
    return expand(skip, clean) * noisy_latents + expand(out, clean) * clean


def pseudo_huber(found: Tensor, target: Tensor, *, c: float) -> Tensor:
    """(B,) mean of sqrt(d^2 + c^2) - c over the elements of (B, ...): between square and absolute distance.

    (Song & Dhariwal 2023; LCM's default with c = 0.001)
    """
    distance = ((found - target).square() + c * c).sqrt() - c
    return distance.flatten(1).mean(1)


def subdivide(timesteps: Tensor, parts: int) -> Tensor:
    """A falling grid (N + 1,) with every interval cut into `parts` equal ones: (N * parts + 1,)."""
    share = torch.arange(parts, dtype=timesteps.dtype) / parts
    fine = timesteps[:-1, None] + share * (timesteps[1:] - timesteps[:-1])[:, None]
    return torch.cat([fine.flatten(), timesteps[-1:]])
