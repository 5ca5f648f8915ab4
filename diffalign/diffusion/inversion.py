"""Probability-flow ODEs from image to noise and back, on a scheduler's grid.

States are float32. One integrator serves both paths: `paths.Path.ode` gives coordinates in which the model's field is
the slope. On the reversed sampling grid it inverts: DDIM inversion is Euler on a variance-preserving path (Song et al.
2021); for flows midpoint is RF-Solver (Wang et al. 2024, the same to 3e-15), and `fireflow` is Deng et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.diffusion.paths import Ode, Path, RectifiedFlow, VariancePreserving, expand

Predict = Callable[[Tensor, Tensor], Tensor]
"""Function from noisy latents (B, ...) and timesteps (B,) to the model's prediction."""
SOLVERS = ("euler", "midpoint", "fireflow", "fixed_point")
FIXED_POINT_ITERATIONS = 4


class InversionError(UserError, RuntimeError):
    """Error for an inversion that does not converge, or for latents that are not finite."""


@torch.no_grad()
def integrate(
    predict: Predict,
    latents: Tensor,
    timesteps: Tensor,
    path: Path,
    *,
    solver: str = "euler",
) -> list[Tensor]:
    """Return the states (B, ...) at each of the `timesteps` (N + 1,).

    Args:
        predict: the model, without gradient.
        latents: first state (B, ...), at timesteps[0].
        timesteps: timesteps on the scheduler's scale, rising to invert or falling to sample.
        path: probability path of the model.
        solver: "euler" (N evaluations), "midpoint" (2 N), "fireflow" (N + 1, flows only: a midpoint whose predictor is
            the last step's field), "fixed_point" (exactly undone by Euler in the other direction; 1 + 4 per interval).
            An interval that ends in pure noise (zero terminal signal-to-noise ratio) is integrated by Euler, since it
            is infinite in the ODE's own time.

    Raises:
        ValueError: unknown solver, or a solver that does not fit the path.
        InversionError: a fixed point does not converge, or a state is not finite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"Unknown solver {solver!r}. Choose from {', '.join(SOLVERS)}.")
    if solver == "fireflow" and not isinstance(path, RectifiedFlow):
        raise ValueError("The solver fireflow needs a rectified flow.")
    field = _Field(predict, path)
    x = latents.float()
    states, last = [x], None
    for now, following in zip(timesteps[:-1].tolist(), timesteps[1:].tolist(), strict=True):
        if field.meets_noise(now, following):
            x = field.euler(x, now, following)
        elif solver == "fixed_point":
            x = _fixed_point(field, x, now, following)
        elif solver == "euler":
            x = field.step(field(x, now), following)
        else:
            start = (
                field(x, now) if last is None or solver == "midpoint" else field.at(x, now, last)
            )
            x, last = _midpoint(field, start, now, following)
        if not x.isfinite().all():
            raise InversionError(
                f"the inversion is not finite at timestep {following:g}. Use more steps or another solver."
            )
        states.append(x)
    return states


class _Field:
    """The model's slope at a state, and steps along it."""

    def __init__(self, predict: Predict, path: Path) -> None:
        self.predict, self.path = predict, path

    def __call__(self, x: Tensor, t: float) -> Ode:
        times = torch.full((len(x),), t, device=x.device)
        return self.path.ode(self.predict(x, times).float(), x, times)

    def at(self, x: Tensor, t: float, slope: Tensor) -> Ode:
        """Return a given slope at another state."""
        return Ode(x, self.time(x, t), slope)

    def meets_noise(self, *timesteps: float) -> bool:
        """Return whether nothing is left of the image at one of the timesteps."""
        if not isinstance(self.path, VariancePreserving):
            return False
        return bool(self.path.is_noise(torch.tensor(timesteps)).any())

    def euler(self, x: Tensor, t: float, following: float) -> Tensor:
        """Take Euler's step without the ODE's coordinates.

        The predicted image and noise are mixed for the next timestep.
        """
        times, after = (torch.full((len(x),), v, device=x.device) for v in (t, following))
        model_pred = self.predict(x, times).float()
        clean = self.path.predict_latents(model_pred, x, times)
        return self.path.add_noise(clean, self.path.predict_noise(model_pred, x, times), after)

    def time(self, like: Tensor, t: float) -> Tensor:
        return self.path.ode_time(torch.full((len(like),), t, device=like.device))

    def step(self, start: Ode, t: float) -> Tensor:
        """Return the noisy latents at `t`, along the slope."""
        length = self.time(start.state, t) - start.time
        times = torch.full((len(start.state),), t, device=start.state.device)
        return self.path.from_ode(start.state + expand(length, start.state) * start.field, times)


def _midpoint(field: _Field, start: Ode, now: float, following: float) -> tuple[Tensor, Tensor]:
    """Take a second-order step with a stage at the middle timestep.

    Return the new state and the stage's slope. The stage may lie anywhere in the ODE's own time.
    """
    middle = (now + following) / 2
    stage = field(field.step(start, middle), middle)
    length = field.time(start.state, following) - start.time
    share = (stage.time - start.time) / length
    weight = expand(1 / (2 * share), start.state)
    slope = (1 - weight) * start.field + weight * stage.field
    return field.step(Ode(start.state, start.time, slope), following), stage.field


def _fixed_point(field: _Field, x: Tensor, now: float, following: float) -> Tensor:
    """Solve y = x + h f(y, t') by iteration."""
    start = field(x, now)
    y = field.step(start, following)
    residuals = []
    for _ in range(FIXED_POINT_ITERATIONS):
        slope = field(y, following).field
        new = field.step(Ode(start.state, start.time, slope), following)
        residuals.append(float((new - y).norm() / x.norm().clamp_min(1e-12)))
        y = new
    if residuals[-1] > max(residuals[0], 1e-6):
        raise InversionError(
            f"the fixed point at timestep {following:g} is not approached (residuals {residuals[0]:.2g} to "
            f"{residuals[-1]:.2g}). Use more steps or another solver."
        )
    return y


def round_trip_error(
    predict: Predict, latents: Tensor, timesteps: Tensor, path: Path, *, solver: str, sampler: str
) -> Tensor:
    """Return the relative error (B,) of latents after inverting and sampling.

    Inverting uses `solver` on the rising `timesteps`, sampling uses `sampler`.
    """
    noise = integrate(predict, latents, timesteps, path, solver=solver)[-1]
    back = integrate(predict, noise, timesteps.flip(0), path, solver=sampler)[-1]
    x = latents.float().flatten(1)
    error: Tensor = (back.flatten(1) - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)
    return error


def inversion_grid(timesteps: Sequence[float] | Tensor, *, clean: float = 0.0) -> Tensor:
    """Return the rising grid (N + 1,) float32 of a scheduler's falling `timesteps` (N,).

    It starts at the clean end.
    """
    falling = torch.as_tensor(timesteps, dtype=torch.float32).cpu()
    rising = falling.flip(0)
    # The scheduler's own last timestep may be the clean end.
    if rising[0] <= clean:
        return rising
    return torch.cat([torch.tensor([clean]), rising])
