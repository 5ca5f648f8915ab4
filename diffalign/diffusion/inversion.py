"""Probability-flow ODEs from image to noise and back, on the grid of a scheduler; states in float32.

One integrator serves both paths: `noise.Path.ode` gives coordinates in which the model's field is the slope. Against
the grid of sampling it inverts: DDIM inversion is Euler on a variance-preserving path (Song et al. 2021), for flows
midpoint is RF-Solver (Wang et al. 2024, the same to 3e-15), `fireflow` Deng et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.diffusion.paths import Ode, Path, RectifiedFlow, VariancePreserving, expand

Predict = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents (B, ...), timesteps (B,)) to the model's prediction."""
SOLVERS = ("euler", "midpoint", "fireflow", "fixed_point")
FIXED_POINT_ITERATIONS = 4


class InversionError(UserError, RuntimeError):
    """An inversion that does not converge, or latents that are not finite."""


@torch.no_grad()
def integrate(
    predict: Predict,
    latents: Tensor,
    timesteps: Tensor,
    path: Path,
    *,
    solver: str = "euler",
) -> list[Tensor]:
    """States (B, ...) at each of the `timesteps` (N + 1,), the first of them `latents`.

    Args:
        predict: the model, without gradient.
        latents: (B, ...) at timesteps[0].
        timesteps: on the scheduler's scale, rising to invert or falling to sample.
        path: of the model.
        solver: "euler" (N evaluations), "midpoint" (2 N), "fireflow" (N + 1, flows only: a midpoint whose predictor is
            the last step's field), "fixed_point" (what Euler in the other direction undoes exactly; 1 + 4 an interval).
            An interval that ends in pure noise (zero terminal signal-to-noise ratio) is one of Euler's: in the ODE's
            own time it has no end.

    Raises:
        InversionError: a fixed point is not approached, or a state is not finite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
    if solver == "fireflow" and not isinstance(path, RectifiedFlow):
        raise ValueError("fireflow is for rectified flows")
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
            here = field(x, now) if last is None or solver == "midpoint" else field.at(x, now, last)
            x, last = _midpoint(field, here, now, following)
        if not x.isfinite().all():
            raise InversionError(f"the inversion is not finite at timestep {following:g}")
        states.append(x)
    return states


class _Field:
    """The model's slope, and where it leads."""

    def __init__(self, predict: Predict, path: Path) -> None:
        self.predict, self.path = predict, path

    def __call__(self, x: Tensor, t: float) -> Ode:
        times = torch.full((len(x),), t, device=x.device)
        return self.path.ode(self.predict(x, times).float(), x, times)

    def at(self, x: Tensor, t: float, slope: Tensor) -> Ode:
        """A known slope at another place."""
        return Ode(x, self.time(x, t), slope)

    def meets_noise(self, *timesteps: float) -> bool:
        """Tell whether nothing is left of the image at one of these times."""
        if not isinstance(self.path, VariancePreserving):
            return False
        return bool(self.path.is_noise(torch.tensor(timesteps)).any())

    def euler(self, x: Tensor, t: float, following: float) -> Tensor:
        """Euler's step without the ODE's coordinates: the image and the noise that are predicted, mixed anew."""
        times, after = (torch.full((len(x),), v, device=x.device) for v in (t, following))
        model_pred = self.predict(x, times).float()
        clean = self.path.predict_latents(model_pred, x, times)
        return self.path.add_noise(clean, self.path.predict_noise(model_pred, x, times), after)

    def time(self, like: Tensor, t: float) -> Tensor:
        return self.path.ode_time(torch.full((len(like),), t, device=like.device))

    def step(self, here: Ode, t: float) -> Tensor:
        """Noisy latents at `t`, along the slope."""
        length = self.time(here.state, t) - here.time
        times = torch.full((len(here.state),), t, device=here.state.device)
        return self.path.from_ode(here.state + expand(length, here.state) * here.field, times)


def _midpoint(field: _Field, here: Ode, now: float, following: float) -> tuple[Tensor, Tensor]:
    """Second order with a stage in the middle of the timesteps, wherever that lies in the ODE's own time; also the
    slope there."""
    middle = (now + following) / 2
    there = field(field.step(here, middle), middle)
    length = field.time(here.state, following) - here.time
    share = (there.time - here.time) / length
    weight = expand(1 / (2 * share), here.state)
    slope = (1 - weight) * here.field + weight * there.field
    return field.step(Ode(here.state, here.time, slope), following), there.field


def _fixed_point(field: _Field, x: Tensor, now: float, following: float) -> Tensor:
    """y = x + h f(y, t'), by iteration."""
    here = field(x, now)
    y = field.step(here, following)
    residuals = []
    for _ in range(FIXED_POINT_ITERATIONS):
        slope = field(y, following).field
        new = field.step(Ode(here.state, here.time, slope), following)
        residuals.append(float((new - y).norm() / x.norm().clamp_min(1e-12)))
        y = new
    if residuals[-1] > max(residuals[0], 1e-6):
        raise InversionError(
            f"the fixed point at timestep {following:g} is not approached (residuals {residuals[0]:.2g} to "
            f"{residuals[-1]:.2g}): use more steps or another solver"
        )
    return y


def round_trip_error(
    predict: Predict, latents: Tensor, timesteps: Tensor, path: Path, *, solver: str, sampler: str
) -> Tensor:
    """(B,) relative distance of latents from what inverting (`solver`, rising timesteps) and sampling (`sampler`) makes
    of them."""
    noise = integrate(predict, latents, timesteps, path, solver=solver)[-1]
    back = integrate(predict, noise, timesteps.flip(0), path, solver=sampler)[-1]
    x = latents.float().flatten(1)
    return (back.flatten(1) - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)


def inversion_grid(timesteps: Sequence[float] | Tensor, *, clean: float = 0.0) -> Tensor:
    """The rising grid of a scheduler's falling `timesteps` (N,), from the clean end: (N + 1,) float32."""
    falling = torch.as_tensor(timesteps, dtype=torch.float32).cpu()
    rising = falling.flip(0)
    if rising[0] <= clean:  # the scheduler's own last timestep is the clean end
        return rising
    return torch.cat([torch.tensor([clean]), rising])
