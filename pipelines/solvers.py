"""Solvers that need fewer steps than the scheduler, on timesteps of the scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.diffusion.paths import Path, RectifiedFlow


class AdamsBashforth:
    """Two-step Adams-Bashforth solver in sigma, second order for a rectified flow.

    The first step is Euler's. On a Gaussian, whose flow has a closed form, 12 steps on SD3's grid are as exact as 64
    Euler steps. Below 20 steps the solver is closer than diffusers' UniPC, whose variable is the log of a
    signal-to-noise ratio that begins at zero (tests/pipelines/test_solvers.py). Step 0 resets the solver, so that one
    object serves any number of batches.
    """

    def __init__(self) -> None:
        self._previous: Tensor | None = None

    def __call__(
        self, i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Any
    ) -> Tensor:
        sigmas = scheduler.sigmas.to(latents.device)
        length = sigmas[i + 1] - sigmas[i]
        velocity = model_pred.float()
        slope = velocity
        if i > 0 and self._previous is not None:
            before = sigmas[i] - sigmas[i - 1]
            slope = velocity + length / (2 * before) * (velocity - self._previous)
        self._previous = velocity
        next_latents: Tensor = latents.float() + length * slope
        return next_latents.to(model_pred.dtype)


def solver_step(name: str, path: Path) -> AdamsBashforth | None:
    """Return the step for `sampling.sample` of a solver's name, or None for the scheduler's.

    Raises:
        UsageError: the solver is not for models on this path.
    """
    if name != "default" and not isinstance(path, RectifiedFlow):
        raise UsageError(f"solver {name!r} is for rectified flows (SD3, FLUX, SANA)")
    return {"default": lambda: None, "adams_bashforth": AdamsBashforth}[name]()
