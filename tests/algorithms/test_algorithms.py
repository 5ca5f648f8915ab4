"""Closed forms and invariants of the losses; expected values are derived by hand."""

import math

import numpy as np
import pytest
import torch

from diffalign.algorithms import advantages as adv
from diffalign.algorithms import awm, diffusion_nft, forward_process, timesteps
from diffalign.config import WEIGHTS, AWMConfig, DiffusionNFTConfig
from diffalign.diffusion.paths import RectifiedFlow, logit_normal_sigmas, shift_sigmas

PATH = RectifiedFlow()


def uniform(**kwargs):
    return AWMConfig(weight="uniform", **kwargs)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # e = 0.0625, t = 0.5
        ("uniform", -0.0625),
        ("t", -0.03125),
        ("t2", -0.015625),
        ("huber", -0.5 * (0.25 - 1e-5)),
        # (0.5 / 0.25) * (0.0625^0.25 - 1e-10^0.25) = 2 * (0.5 - 0.0031623)
        ("ghuber", -2 * (0.5 - 10**-2.5)),
    ],
)
def test_log_likelihood_closed_form(weight, expected):
    value = awm.log_likelihood(torch.tensor([0.0625]), torch.tensor([0.5]), weight=weight)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_every_configured_weight_has_a_form():
    for weight in WEIGHTS:
        value = awm.log_likelihood(torch.zeros(1), torch.full((1,), 0.5), weight=weight)
        assert value.item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="Unknown weight 'cubic'"):
        awm.log_likelihood(torch.zeros(1), torch.zeros(1), weight="cubic")


def random_case(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(n, 4, 3, 3, generator=generator, requires_grad=True)
    target = torch.randn(n, 4, 3, 3, generator=generator)
    sigmas = torch.rand(n, generator=generator) * 0.9 + 0.05
    advantages = torch.rand(n, generator=generator) * 2 - 1
    return pred, target, sigmas, advantages


@pytest.mark.parametrize("weight", WEIGHTS)
def test_on_policy_ratio_is_one_and_gradient_is_advantage_weighted_matching(weight):
    pred, target, sigmas, advantages = random_case()
    loss, metrics = awm.awm_loss(
        pred, target, sigmas, advantages, config=AWMConfig(weight=weight, ghuber_power=0.25)
    )
    assert metrics["ratio"].tolist() == [1.0] * 6
    assert metrics["clipped"].sum() == 0
    loss.sum().backward()
    # d(-A exp(l - sg l)) = A k de with k = 1, t, t^2, t / (2 sqrt e), t e^(p - 1)
    e = (pred.detach() - target).square().flatten(1).mean(1)
    k = {
        "uniform": torch.ones(6),
        "t": sigmas,
        "t2": sigmas**2,
        "huber": sigmas / (2 * e.sqrt()),
        "ghuber": sigmas * e**-0.75,
    }[weight]
    de = 2 * (pred.detach() - target) / pred[0].numel()
    torch.testing.assert_close(pred.grad, (advantages * k).view(-1, 1, 1, 1) * de)


def test_unit_advantages_give_plain_flow_matching():
    pred, target, sigmas, _ = random_case()
    awm.awm_loss(pred, target, sigmas, torch.ones(6), config=uniform())[0].mean().backward()
    ours, pred.grad = pred.grad.clone(), None
    torch.nn.functional.mse_loss(pred, target).backward()
    torch.testing.assert_close(ours, pred.grad)


def test_negated_advantages_negate_the_gradient():
    pred, target, sigmas, advantages = random_case()
    config = AWMConfig()
    awm.awm_loss(pred, target, sigmas, advantages, config=config)[0].sum().backward()
    first, pred.grad = pred.grad.clone(), None
    awm.awm_loss(pred, target, sigmas, -advantages, config=config)[0].sum().backward()
    torch.testing.assert_close(first, -pred.grad)


def test_off_policy_ratio_and_clip():
    # e = 0 and l_old = -log 2: rho = 2; clip 0.2 holds it at 1.2 for A > 0 and not for A < 0
    pred = torch.zeros(2, 4, requires_grad=True)
    old = torch.full((2,), -math.log(2))
    loss, metrics = awm.awm_loss(
        pred,
        torch.zeros(2, 4),
        torch.full((2,), 0.5),
        torch.tensor([1.0, -1.0]),
        config=uniform(clip_range=0.2),
        old_log_likelihood=old,
    )
    torch.testing.assert_close(metrics["ratio"], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.2, 2.0]))
    assert metrics["clipped"].tolist() == [1.0, 1.0]


def test_other_noise_for_the_old_policy_is_noticed_by_the_variance_of_the_ratio():
    """The same noise for both policies is what makes the ratio usable: with other noise it scatters."""
    torch.manual_seed(0)
    latents, sigmas = torch.randn(256, 16), torch.rand(256) * 0.8 + 0.1
    weights = torch.randn(16, 16) * 0.1

    def likelihood(noise, delta):
        noisy = PATH.add_noise(latents, noise, PATH.timesteps(sigmas))
        pred = noisy @ (weights + delta)
        error = forward_process.matching_error(
            pred, PATH.target(latents, noise, PATH.timesteps(sigmas))
        )
        return awm.log_likelihood(error, sigmas, weight="uniform")

    noise, other = torch.randn(256, 16), torch.randn(256, 16)
    same = (likelihood(noise, 1e-3) - likelihood(noise, 0.0)).exp()
    different = (likelihood(noise, 1e-3) - likelihood(other, 0.0)).exp()
    assert same.std() < 0.05
    assert different.std() > 0.3


def test_proximal_loss_is_zero_with_zero_gradient_at_the_other_policy():
    pred = torch.randn(3, 5, requires_grad=True)
    loss = forward_process.proximal_loss(pred, pred)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert pred.grad.abs().max() == 0
    forward_process.proximal_loss(pred, pred + 1).sum().backward()
    torch.testing.assert_close(pred.grad, torch.full((3, 5), -2 / 5))


def test_lag_decay():
    assert [forward_process.lag_decay(s, ramp=0.001, maximum=0.3) for s in (1, 100, 300, 1000)] == [
        0.001,
        0.1,
        0.3,
        0.3,
    ]


class TestDiffusionNFT:
    def case(self, optimality, *, moved=0.0, seed=0):
        pred, target, sigmas, _ = random_case(seed=seed)
        generator = torch.Generator().manual_seed(9)
        latents = torch.randn(pred.shape, generator=generator)
        noisy = PATH.add_noise(latents, target + latents, PATH.timesteps(sigmas))
        old = pred.detach() + moved * torch.randn(pred.shape, generator=generator)
        return pred, old, noisy, latents, sigmas, torch.full((6,), optimality), target

    @pytest.mark.parametrize("mix", [0.1, 1.0, 2.0])
    def test_gradient_at_the_old_policy_is_advantage_weighted_matching(self, mix):
        pred, old, noisy, latents, sigmas, optimality, target = self.case(0.8)
        loss, _ = diffusion_nft.nft_loss(pred, old, noisy, latents, sigmas, optimality, mix=mix)
        loss.sum().backward()
        # (r - (1 - r)) t / mean|v - v*| de, and A / c = 2 r - 1
        gap = pred.detach() - target
        k = 0.6 * sigmas / gap.abs().flatten(1).mean(1)
        expected = k.view(-1, 1, 1, 1) * 2 * gap / gap[0].numel()
        torch.testing.assert_close(pred.grad, expected, rtol=1e-4, atol=1e-6)

    def test_an_image_of_average_optimality_moves_nothing(self):
        pred, old, noisy, latents, sigmas, optimality, _ = self.case(0.5)
        diffusion_nft.nft_loss(pred, old, noisy, latents, sigmas, optimality, mix=0.7)[
            0
        ].sum().backward()
        assert pred.grad.abs().max() < 1e-6

    def test_swapping_the_optimality_flips_the_gradient_at_the_old_policy(self):
        grads = []
        for r in (0.9, 0.1):
            pred, old, noisy, latents, sigmas, optimality, _ = self.case(r)
            diffusion_nft.nft_loss(pred, old, noisy, latents, sigmas, optimality, mix=1.0)[
                0
            ].sum().backward()
            grads.append(pred.grad)
        torch.testing.assert_close(grads[0], -grads[1])

    @pytest.mark.parametrize("optimality", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("mix", [0.5, 1.0])
    def test_convex_in_the_prediction_for_every_optimality(self, optimality, mix):
        """Normalisers held fixed, the Hessian is 2 beta t^2 / n (r / w+ + (1 - r) / w-) times the identity."""
        pred, old, noisy, latents, sigmas, r, _ = self.case(optimality, moved=0.2)
        loss, _ = diffusion_nft.nft_loss(pred, old, noisy, latents, sigmas, r, mix=mix)
        direction = torch.randn(pred.shape, generator=torch.Generator().manual_seed(2))
        (slope,) = torch.autograd.grad(loss.sum(), pred, create_graph=True)
        (bend,) = torch.autograd.grad((slope * direction).sum(), pred)
        t = sigmas.view(-1, 1, 1, 1)
        plus = noisy - t * ((1 - mix) * old + mix * pred.detach()) - latents
        minus = noisy - t * ((1 + mix) * old - mix * pred.detach()) - latents
        w_plus, w_minus = (x.abs().flatten(1).mean(1) for x in (plus, minus))
        factor = 2 * mix * sigmas**2 / pred[0].numel() * (r / w_plus + (1 - r) / w_minus)
        torch.testing.assert_close(bend, factor.view(-1, 1, 1, 1) * direction)

    def test_finite_where_the_image_is_hit_exactly(self):
        _, _, noisy, latents, sigmas, optimality, target = self.case(1.0)
        loss, _ = diffusion_nft.nft_loss(
            target, target, noisy, latents, sigmas, optimality, mix=1.0
        )
        assert loss.isfinite().all()
        assert loss.abs().max() < 1e-6

    def test_loss_of_a_sample_is_in_the_scale_of_the_advantages(self):
        """At the old policy the gradient is A t / mean|v - v*| times that of the matching error, A clipped to 5."""
        pred, old, noisy, latents, sigmas, _, target = self.case(0.0)
        advantages = torch.tensor([-9.0, -5.0, -2.5, 0.0, 2.5, 9.0])
        sample = forward_process.ForwardSample(
            latents, noisy, target, sigmas, advantages, pred, old
        )
        diffusion_nft.loss(sample, DiffusionNFTConfig())[0].sum().backward()
        gap = pred.detach() - target
        k = advantages.clamp(-5, 5) * sigmas / gap.abs().flatten(1).mean(1)
        expected = k.view(-1, 1, 1, 1) * 2 * gap / gap[0].numel()
        torch.testing.assert_close(pred.grad, expected, rtol=1e-4, atol=1e-6)

    def test_advantages_become_optimality(self):
        pred, old, noisy, latents, sigmas, _, target = self.case(0.0)
        advantages = torch.tensor([-9.0, -5.0, -2.5, 0.0, 2.5, 9.0])
        sample = forward_process.ForwardSample(
            latents, noisy, target, sigmas, advantages, pred, old
        )
        _, metrics = diffusion_nft.loss(sample, DiffusionNFTConfig())
        assert metrics["optimality"].tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
        assert set(metrics) == set(diffusion_nft.LOSS.metrics)
        with pytest.raises(ValueError, match="old policy"):
            diffusion_nft.loss(
                forward_process.ForwardSample(latents, noisy, target, sigmas, advantages, pred),
                DiffusionNFTConfig(),
            )


class TestAdvantages:
    def rewards(self):
        torch.manual_seed(1)
        return torch.rand(24), torch.arange(6).repeat_interleave(4)

    @pytest.mark.parametrize("scope", ["global", "group"])
    def test_sum_to_zero_in_every_group(self, scope):
        rewards, group = self.rewards()
        result = adv.group_advantages(rewards, group, std_scope=scope)
        assert torch.zeros(6).index_add_(0, group, result).abs().max() < 1e-6

    @pytest.mark.parametrize("scope", ["global", "group"])
    def test_do_not_depend_on_order_shift_or_scale(self, scope):
        rewards, group = self.rewards()
        expected = adv.group_advantages(rewards, group, std_scope=scope)
        order = torch.randperm(24)
        shuffled = adv.group_advantages(rewards[order], group[order], std_scope=scope)
        torch.testing.assert_close(shuffled, expected[order])
        shifted = adv.group_advantages(rewards + 7, group, std_scope=scope)
        torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-5)
        scaled = adv.group_advantages(rewards * 1000, group, std_scope=scope)
        torch.testing.assert_close(scaled, expected, rtol=2e-3, atol=1e-5)

    def test_closed_form(self):
        # group means 2 and 5; all: mean 3.5, squares 2.25 * 2 + ... = (6.25 + .25 + .25 + 6.25) / 4 = 3.25
        rewards, group = torch.tensor([1.0, 3.0, 4.0, 6.0]), torch.tensor([0, 0, 9, 9])
        result = adv.group_advantages(rewards, group, std_scope="global")
        torch.testing.assert_close(
            result, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / (3.25**0.5 + 1e-4)
        )
        result = adv.group_advantages(rewards, group, std_scope="group")
        torch.testing.assert_close(result, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / (1 + 1e-4))

    def test_a_constant_group_is_zero_and_uninformative(self):
        rewards, group = torch.tensor([2.0, 2.0, 1.0, 3.0]), torch.tensor([0, 0, 1, 1])
        for scope in ("global", "group"):
            result = adv.group_advantages(rewards, group, std_scope=scope)
            assert result[:2].tolist() == [0, 0]
            assert result.isfinite().all()
        assert adv.informative(rewards, group).tolist() == [False, False, True, True]

    def test_failed_rewards_take_no_part(self):
        rewards = torch.tensor([1.0, torch.nan, 3.0, torch.nan, torch.nan])
        group = torch.tensor([0, 0, 0, 1, 1])
        result = adv.group_advantages(rewards, group)
        expected = adv.group_advantages(rewards[[0, 2]], group[[0, 2]])
        torch.testing.assert_close(result[[0, 2]], expected)
        assert result[[1, 3, 4]].tolist() == [0, 0, 0]
        assert adv.informative(rewards, group).tolist() == [True, False, True, False, False]

    def test_diversity_is_the_spread_within_groups(self):
        group = torch.tensor([0, 0, 1, 1, 2])
        latents = torch.tensor([[0.0, 2.0], [2.0, 2.0], [5.0, 5.0], [5.0, 5.0], [9.0, 9.0]])
        # group 0: standard deviations sqrt 2 and 0; group 1 draws one image; group 2 has one image only
        moments = adv.group_moments(latents, group, groups=3)
        assert adv.group_diversity(moments) == pytest.approx(2**0.5 / 4)
        # whichever process has which image
        parts = [adv.group_moments(latents[r], group[r], groups=3) for r in ([0, 2, 4], [1, 3])]
        torch.testing.assert_close(parts[0] + parts[1], moments)
        assert math.isnan(adv.group_diversity(adv.group_moments(latents[4:], group[4:], groups=3)))

    def test_clip_and_scale(self):
        values = torch.tensor([-10.0, -5.0, 0.0, 2.5, 7.0])
        result = adv.clip_advantages(values, clip=5.0, maximum=1.0)
        assert result.tolist() == [-1.0, -1.0, 0.0, 0.5, 1.0]
        result = adv.clip_advantages(values, clip=5.0, maximum=2.0)
        assert result.tolist() == [-2.0, -2.0, 0.0, 1.0, 2.0]

    def test_combined_advantages_ignore_the_scale_of_each_reward(self):
        rewards, group = self.rewards()
        other = torch.rand(24)
        weights = {"a": 1.0, "b": 1.0}
        first = adv.combined_advantages(
            {"a": rewards, "b": other}, weights, group, std_scope="global"
        )
        second = adv.combined_advantages(
            {"a": rewards * 1e4, "b": other}, weights, group, std_scope="global"
        )
        torch.testing.assert_close(first, second, rtol=2e-3, atol=1e-3)

    def test_wrong_shapes_are_refused(self):
        with pytest.raises(ValueError, match="must be"):
            adv.group_advantages(torch.zeros(3), torch.zeros(2))


class TestTimesteps:
    def test_strata_cover_the_range_once(self):
        for grid, number in ((14, 6), (10, 4), (8, 8), (28, 3)):
            parts = timesteps.strata(grid, number)
            assert [i for p in parts for i in p] == list(range(grid))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_mean_of_the_draws_is_the_analytic_one(self):
        grid = shift_sigmas(torch.linspace(1, 0.1, 10), 3.0)
        parts = timesteps.strata(10, 4, stop=0.8)
        generator = torch.Generator().manual_seed(0)
        draws = torch.stack([timesteps.draw(parts, generator=generator) for _ in range(4000)])
        assert draws.shape == (4000, 4)
        expected = np.mean([grid[list(p)].mean().item() for p in parts])
        spread = grid[draws].mean(1).std() / 4000**0.5
        assert abs(grid[draws].mean() - expected) < 4 * spread
        assert all(
            ((d >= p.start) & (d < p.stop)).all() for d, p in zip(draws.T, parts, strict=True)
        )

    def test_independent_draws_have_the_same_mean_and_a_larger_spread(self):
        grid = shift_sigmas(torch.linspace(1, 0.1, 10), 3.0)
        means, spreads = [], []
        for independent in (False, True):
            parts = timesteps.strata(10, 4, stop=0.8, independent=independent)
            generator = torch.Generator().manual_seed(0)
            draws = torch.stack([timesteps.draw(parts, generator=generator) for _ in range(4000)])
            of_image = grid[draws].mean(1)
            means.append(of_image.mean())
            spreads.append(of_image.std())
        assert {len(p) for p in parts} == {8}
        # the eight points are cut into fours of equal size, so that both are means over all of them
        assert abs(means[1] - means[0]) < 4 * spreads[1] / 4000**0.5
        assert spreads[0] < 0.5 * spreads[1]

    @pytest.mark.parametrize(
        "arguments", [{"start": 0.5, "stop": 0.5}, {"start": 0.0, "stop": 0.2}]
    )
    def test_impossible_strata_are_explained(self, arguments):
        with pytest.raises(ValueError, match="grid"):
            timesteps.strata(10, 4, **arguments)


class TestRectifiedFlow:
    def test_conversions_are_inverse(self):
        latents, noise = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
        times = torch.tensor([0.0, 250.0, 500.0, 999.0, 1000.0])
        noisy = PATH.add_noise(latents, noise, times)
        velocity = PATH.target(latents, noise, times)
        torch.testing.assert_close(PATH.predict_latents(velocity, noisy, times), latents)
        torch.testing.assert_close(PATH.predict_noise(velocity, noisy, times), noise)
        torch.testing.assert_close(PATH.timesteps(PATH.sigmas(times)), times)
        torch.testing.assert_close(noisy[0], latents[0])
        torch.testing.assert_close(noisy[-1], noise[-1])

    def test_agrees_with_diffusers(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(8)
        latents, noise = torch.randn(8, 4), torch.randn(8, 4)
        expected = scheduler.scale_noise(latents, scheduler.timesteps, noise)
        torch.testing.assert_close(PATH.add_noise(latents, noise, scheduler.timesteps), expected)
        grid = torch.linspace(1, 1 / 8, 8)
        scheduler.set_timesteps(sigmas=grid.tolist())
        torch.testing.assert_close(shift_sigmas(grid, 3.0), scheduler.sigmas[:-1])

    def test_logit_normal_density_has_its_median_and_mean(self):
        sigmas = logit_normal_sigmas(
            20000, mean=0.5, std=0.8, generator=torch.Generator().manual_seed(0)
        )
        assert sigmas.median() == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.01)
        assert 0 < sigmas.min() < sigmas.max() < 1

    def test_shift_three_moves_time_towards_noise(self):
        uniform_sigmas = torch.linspace(0, 1, 10001)
        assert shift_sigmas(uniform_sigmas, 3.0).mean() == pytest.approx(0.676, abs=0.001)
        torch.testing.assert_close(shift_sigmas(uniform_sigmas, 1.0), uniform_sigmas)
