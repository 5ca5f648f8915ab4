"""Inversion: a Gaussian whose flow is known, orders of convergence, round trips, diffusers' schedulers."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion.inversion import (
    InversionError,
    integrate,
    inversion_grid,
    round_trip_error,
)
from diffalign.diffusion.paths import RectifiedFlow, VariancePreserving, implied_noise

FLOW = RectifiedFlow()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS = DDPMScheduler(**BETAS).alphas_cumprod
EPSILON, V = VariancePreserving(ALPHAS), VariancePreserving(ALPHAS, "v_prediction")
SPREAD = 0.6
"""Standard deviation of the Gaussian data."""


def perfect(path):
    """The best prediction for x_0 ~ N(0, SPREAD^2): everything is linear in x_t."""

    def predict(x, timesteps):
        a, s = (v.view(-1, 1) for v in path.scales(timesteps))
        variance = a**2 * SPREAD**2 + s**2
        noise = x * s / variance
        latents = x * a * SPREAD**2 / variance
        if isinstance(path, RectifiedFlow):
            return noise - latents
        return noise if path.prediction_type == "epsilon" else a * noise - s * latents

    return predict


def exact(path, x, t):
    """Where the flow takes x_0: every quantile stays itself."""
    a, s = path.scales(torch.tensor([float(t)]))
    a0, s0 = path.scales(torch.tensor([0.0]))
    start = (a0**2 * SPREAD**2 + s0**2).sqrt()
    return x * (a**2 * SPREAD**2 + s**2).sqrt() / start


@pytest.mark.parametrize("path", [FLOW, EPSILON, V], ids=["flow", "epsilon", "v"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("fixed_point", 1)])
def test_solvers_converge_to_the_closed_form(path, solver, order):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (16, 32, 64):
        grid = torch.linspace(0, 900, steps + 1)
        found = integrate(perfect(path), x, grid, path, solver=solver)
        assert len(found) == steps + 1
        errors.append(float((found[-1] - exact(path, x, 900)).abs().max()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(slopes) > 0.8 * order, (errors, slopes)


def test_fireflow_is_nearly_as_good_as_midpoint_for_half_the_price():
    x, calls = torch.randn(4, 8), []

    def counted(x, t):
        calls.append(t)
        return perfect(FLOW)(x, t)

    errors = {}
    for solver in ("euler", "midpoint", "fireflow"):
        calls.clear()
        grid = torch.linspace(0, 900, 17)
        found = integrate(counted, x, grid, FLOW, solver=solver)[-1]
        errors[solver] = (float((found - exact(FLOW, x, 900)).abs().max()), len(calls))
    assert errors["fireflow"][1] == 17
    assert errors["midpoint"][1] == 32
    assert errors["midpoint"][0] < errors["fireflow"][0] < errors["euler"][0] / 4


def test_rf_solvers_update_is_midpoint():
    """x + h v + h^2 / 2 dv/dt with dv/dt from a half step (Wang et al. 2024) is x + h v(half step)."""
    x, predict = torch.randn(3, 5, dtype=torch.float64).float(), perfect(FLOW)
    now, following = 300.0, 400.0
    h = (following - now) / 1000
    t = torch.full((3,), now)
    v = predict(x, t)
    there = predict(x + h / 2 * v, t + 50)
    expected = x + h * v + h**2 / 2 * (there - v) / (h / 2)
    [_, found] = integrate(predict, x, torch.tensor([now, following]), FLOW, solver="midpoint")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [FLOW, EPSILON, V], ids=["flow", "epsilon", "v"])
def test_the_fixed_point_is_undone_by_eulers_sampler(path):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(20, 900, 33)
    flags = {"path": path, "sampler": "euler"}
    euler = round_trip_error(perfect(path), x, grid, solver="euler", **flags)
    fixed = round_trip_error(perfect(path), x, grid, solver="fixed_point", **flags)
    assert fixed.max() < 1e-3 < euler.min()


def test_a_step_forward_and_its_inverse_with_the_same_field_return():
    """What Song's DDIM inversion relies on: with the field of one place both ways, nothing is lost."""
    x, noise = torch.randn(2, 6), torch.randn(2, 6)
    for path in (FLOW, EPSILON):
        there = integrate(lambda *a: noise, x, torch.tensor([100.0, 200.0]), path)[-1]
        back = integrate(lambda *a: noise, there, torch.tensor([200.0, 100.0]), path)[-1]
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_sampling_down_the_grid_is_diffusers_ddim():
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 6)
    expected = x
    for t in scheduler.timesteps:
        pred = perfect(EPSILON)(expected, t.expand(2))
        expected = scheduler.step(pred, t, expected).prev_sample
    # its last step goes from timestep 0 to 0
    found = integrate(perfect(EPSILON), x, scheduler.timesteps.float(), EPSILON)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sampling_down_the_grid_is_diffusers_flow_matching():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    x = torch.randn(2, 6)
    expected = x
    for t in scheduler.timesteps:
        pred = perfect(FLOW)(expected, t.expand(2))
        expected = scheduler.step(pred, t, expected).prev_sample
    grid = inversion_grid(scheduler.timesteps)
    assert grid[0] == 0
    torch.testing.assert_close(grid[1:].flip(0), scheduler.timesteps)
    found = integrate(perfect(FLOW), x, grid.flip(0), FLOW)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grids_that_end_clean_stay_as_they_are():
    assert inversion_grid(torch.tensor([900.0, 450.0, 0.0])).tolist() == [0, 450, 900]


def test_the_noise_that_an_inversion_implies_reproduces_it():
    x = torch.randn(4, 8)
    for path in (FLOW, EPSILON, V):
        grid = torch.linspace(0, 900, 9)
        for t, state in list(zip(grid, integrate(perfect(path), x, grid, path), strict=True))[1:]:
            times = t.expand(4)
            noise = implied_noise(path, x, state, times)
            torch.testing.assert_close(path.add_noise(x, noise, times), state, rtol=1e-5, atol=1e-5)
            target = path.target(x, noise, times)
            torch.testing.assert_close(
                path.predict_latents(target, state, times), x, rtol=1e-3, atol=1e-3
            )
    # the chord of a flow: (x_t - x_0) / t
    times = torch.full((4,), 500.0)
    state = torch.randn(4, 8)
    chord = FLOW.target(x, implied_noise(FLOW, x, state, times), times)
    torch.testing.assert_close(chord, (state - x) / 0.5)


def test_what_does_not_converge_is_an_error():
    x = torch.randn(2, 3)
    with pytest.raises(InversionError, match="not approached"):
        integrate(lambda x, t: 40 * x, x, torch.tensor([0.0, 500.0]), FLOW, solver="fixed_point")
    with pytest.raises(InversionError, match="not finite"):
        integrate(lambda x, t: x * float("nan"), x, torch.tensor([0.0, 500.0]), FLOW)
    with pytest.raises(ValueError, match="Choose from euler"):
        integrate(perfect(FLOW), x, torch.tensor([0.0, 1.0]), FLOW, solver="heun")
    with pytest.raises(ValueError, match="needs a rectified flow"):
        integrate(perfect(EPSILON), x, torch.tensor([0.0, 1.0]), EPSILON, solver="fireflow")


class TestVariancePreserving:
    """Against diffusers' DDPM scheduler."""

    def test_noise_and_targets_are_diffusers(self):
        scheduler = DDPMScheduler(**BETAS)
        x, noise = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
        times = torch.tensor([0, 10, 500, 700, 999])
        torch.testing.assert_close(
            EPSILON.add_noise(x, noise, times), scheduler.add_noise(x, noise, times)
        )
        torch.testing.assert_close(
            V.target(x, noise, times), scheduler.get_velocity(x, noise, times)
        )
        assert EPSILON.target(x, noise, times) is noise

    @pytest.mark.parametrize("path", [EPSILON, V], ids=["epsilon", "v"])
    def test_conversions_are_inverse(self, path):
        x, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
        times = torch.tensor([5.0, 100.0, 333.5, 800.0])
        noisy = path.add_noise(x, noise, times)
        target = path.target(x, noise, times)
        torch.testing.assert_close(
            path.predict_latents(target, noisy, times), x, rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(
            path.predict_noise(target, noisy, times), noise, rtol=1e-4, atol=1e-4
        )

    def test_other_predictions_are_refused(self):
        with pytest.raises(ValueError, match="prediction type 'sample'"):
            VariancePreserving(ALPHAS, "sample")
