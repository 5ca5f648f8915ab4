"""Alignment in closed form: the optimum, what it is invariant to, and that gradient descent goes there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffalign.core.errors import UsageError
from diffalign.latents.alignment import (
    MODES,
    GradientAlignment,
    Moments,
    Statistics,
    aligned_rows,
    interpolated,
    noise_ridge,
    ratio,
    signal_shift,
)


def grids(seed=0, k=2, b=5, d=6, channels=12):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(b, d, 3, 2, generator=generator) + 0.3
    noise = torch.randn(b, channels, 3 * k, 2 * k, generator=generator)
    mix = torch.randn(channels, d, generator=generator)
    old = torch.einsum("cd,bdhw->bchw", mix, interpolated(new, k, "nearest")) + 0.5 * noise
    return old, new


def fit(old, new, **options):
    x, y = aligned_rows(old, new, **options)
    found = Statistics(x.shape[1], y.shape[1])
    found.add(x, y)
    return found.solve()


def test_least_squares_is_numpys():
    x, y = aligned_rows(*grids())
    wanted = np.linalg.lstsq(
        np.c_[x.double().numpy(), np.ones(len(x))], y.double().numpy(), rcond=None
    )[0]
    found = fit(*grids())
    np.testing.assert_allclose(found.weight.T, wanted[:-1], atol=1e-5)
    np.testing.assert_allclose(found.bias, wanted[-1], atol=1e-5)
    residual = y.double().numpy() - np.c_[x.double().numpy(), np.ones(len(x))] @ wanted
    assert found.error == pytest.approx((residual**2).mean(), rel=1e-6)
    variance = y.double().numpy().var(0).sum()
    assert found.r2 == pytest.approx(1 - (residual**2).mean(0).sum() / variance, rel=1e-6)


def test_statistics_add_up_over_batches_and_shards():
    x, y = aligned_rows(*grids())
    whole, first, second = (Statistics(x.shape[1], y.shape[1]) for _ in range(3))
    whole.add(x, y)
    first.add(x[:7], y[:7])
    second.add(x[7:], y[7:])
    first.merge(second)
    assert first.count == whole.count == len(x)
    torch.testing.assert_close(first.solve().weight, whole.solve().weight)


def test_the_same_space_is_left_as_it_is():
    """A4: z_S = z_T and k = 1 give back the old embedder, without an error."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(6, 5, 4, 4, generator=generator)
    weight, bias = torch.randn(8, 5, generator=generator), torch.randn(8, generator=generator)
    old = torch.einsum("cd,bdhw->bchw", weight, latents) + bias[:, None, None]
    found = fit(old, latents)
    torch.testing.assert_close(found.weight, weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.bias, bias, atol=1e-5, rtol=1e-5)
    assert found.error < 1e-10
    assert found.r2 == pytest.approx(1)


def test_nearest_upsampling_is_downsampling():
    """A1: the losses differ by what averaging loses of the old tokens, so their optima are one."""
    old, new = grids()
    down = fit(old, new)
    up = fit(old, new, objective="upsample", mode="nearest")
    torch.testing.assert_close(down.weight, up.weight, atol=1e-5, rtol=1e-5)
    lost = (old - interpolated(F.avg_pool2d(old, 2), 2, "nearest")).square().mean()
    assert up.error == pytest.approx(down.error + float(lost), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_interpolation_commutes_with_a_map_of_channels(mode):
    """A2."""
    _, new = grids()
    weight = torch.randn(7, new.shape[1], generator=torch.Generator().manual_seed(2))

    def mapped(grid):
        return torch.einsum("cd,bdhw->bchw", weight, grid)

    torch.testing.assert_close(
        mapped(interpolated(new, 2, mode)), interpolated(mapped(new), 2, mode)
    )


@pytest.mark.parametrize("objective", ["downsample", "upsample"])
def test_gradient_descent_goes_to_the_closed_form(objective):
    """A3."""
    x, y = aligned_rows(*grids(), objective=objective)
    descended = GradientAlignment(x.shape[1], y.shape[1], learning_rate=2e-2)
    losses = [descended.step(x, y) for _ in range(1500)]
    exact = fit(*grids(), objective=objective)
    assert losses[-1] < losses[0]
    assert exact.error <= descended.error(x, y) + 1e-7
    torch.testing.assert_close(descended.layer.weight, exact.weight, atol=5e-3, rtol=1e-2)


def test_the_bias_matches_the_means():
    """A5."""
    old, new = grids()
    found = fit(old, new)
    x, y = aligned_rows(old, new)
    torch.testing.assert_close(
        (x @ found.weight.T + found.bias).mean(0), y.mean(0), atol=1e-5, rtol=1e-5
    )


def test_no_gradient_reaches_what_is_aligned_to():
    """A6: the statistics are of numbers, not of graphs."""
    old, new = (g.requires_grad_() for g in grids())
    with torch.no_grad():
        found = fit(old, new)
    assert not found.weight.requires_grad
    assert old.grad is None
    assert new.grad is None


def test_grids_that_do_not_fit_are_refused():
    """A7."""
    assert ratio((8, 4), (4, 2)) == 2
    for old, new in (((6, 6), (4, 4)), ((8, 4), (4, 1)), ((2, 2), (4, 4)), ((4, 4), (0, 0))):
        with pytest.raises(UsageError, match="a whole number of old tokens"):
            ratio(old, new)
    with pytest.raises(UsageError, match="no image was read"):
        Statistics(2, 3).solve()


def test_the_noise_aware_map_is_the_best_for_noisy_latents():
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(40_000, 3, generator=generator) * torch.tensor([2.0, 1.0, 0.2])
    wanted = clean @ torch.randn(3, 4, generator=generator)
    sigmas = torch.full((1,), 0.5)
    noisy = 0.5 * clean + 0.5 * torch.randn(clean.shape, generator=generator)
    statistics, direct = Statistics(3, 4), Statistics(3, 4)
    statistics.add(clean, wanted)
    direct.add(noisy, 0.5 * wanted)
    found = statistics.solve(ridge=noise_ridge(sigmas))
    torch.testing.assert_close(found.weight, direct.solve().weight, atol=0.03, rtol=0.05)
    assert statistics.solve().error < found.error, "of clean latents the plain one is better"


def test_directions_that_do_not_vary_are_left_out():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(4))
    x[:, 2] = 1.5
    found = Statistics(3, 1)
    found.add(x, x[:, :1] * 2 + 1)
    fit = found.solve()
    torch.testing.assert_close(fit.weight, torch.tensor([[2.0, 0.0, 0.0]]), atol=1e-6, rtol=1e-5)


def test_the_shift_that_equals_the_signal_to_noise_ratio():
    """Tokens of twice the amplitude for the same noise need r = 2: s / (1 - s) doubles."""
    r = signal_shift(Moments(image=3.0, noise=4.0), Moments(image=12.0, noise=4.0))
    assert r == pytest.approx(2)
    s = 0.3
    moved = r * s / (1 + (r - 1) * s)
    assert moved / (1 - moved) == pytest.approx(2 * s / (1 - s))
