"""FDFO: its loss in closed form, its rollouts of pairs, and that it learns."""

import numpy as np
import pytest
import torch
from marks import slow_except
from tiny_runs import redness, settings, trainer, weights

from diffalign import lora
from diffalign.algorithms.fdfo import LOSS, direction, penalized_surrogate
from diffalign.algorithms.forward_process import ForwardSample, matching_error
from diffalign.config import ConfigError
from diffalign.config.fdfo import FDFOConfig
from diffalign.methods.online.states import (
    PairedStates,
    churned,
    differences,
    first_of_pairs,
    level_before,
)
from diffalign.types import RewardOutput

SHAPE = (4, 2, 3, 3)


def sample(seed=0, *, moved=0.0):
    """Return four images with predictions near those of their rollouts, in float64."""
    generator = torch.Generator().manual_seed(seed)
    latents, partner, old, change = (
        torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    pred = (old + moved * change).requires_grad_()
    difference = torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=torch.float64)
    sigmas = torch.full((4,), 0.5)
    return ForwardSample(latents, latents, latents, sigmas, difference, pred, old, partner=partner)


def test_the_gradient_on_policy_moves_the_image_in_the_direction_of_the_better_one():
    """At rho = 1 it is 2 R d^ / D: the velocity falls, and the clean image moves along R d."""
    s = sample()
    value, metrics = LOSS.loss(s, FDFOConfig())
    value.sum().backward()
    move = direction(s.latents, s.partner).double()
    wanted = 2 * s.advantages.view(-1, 1, 1, 1) * move / move[0].numel()
    torch.testing.assert_close(s.model_pred.grad, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value.detach(), -s.advantages.float(), check_dtype=False)
    assert (metrics["ratio"] == 1).all()
    assert (metrics["moved"] == 0).all()


def test_both_images_of_a_pair_ask_for_the_same():
    """Exchanged images with the opposite difference have the same target change."""
    s = sample()
    one = direction(s.latents, s.partner) * s.advantages.view(-1, 1, 1, 1)
    other = direction(s.partner, s.latents) * -s.advantages.view(-1, 1, 1, 1)
    torch.testing.assert_close(one, other)


def test_the_direction_is_normalised_by_its_square():
    half = (sample().latents - sample().partner).float() / 2
    found = direction(sample().latents, sample().partner)
    square = half.square().flatten(1).mean(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, half / (square + 1e-6))
    same = torch.ones(1, 2, 2, 2)
    assert (direction(same, same) == 0).all()


def test_the_ratio_is_that_of_the_likelihoods():
    s = sample(moved=0.01)
    move = direction(s.latents, s.partner)
    target = s.old_pred.float() - move
    likelihood = -matching_error(s.model_pred, target)
    start = -move.square().flatten(1).mean(1)
    _, metrics = LOSS.loss(s, FDFOConfig())
    torch.testing.assert_close(
        metrics["ratio"], (likelihood - start).exp().detach(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("difference", [0.7, -0.2])
def test_the_loss_is_least_at_the_edge_of_its_range(difference):
    ratio = torch.linspace(0.9, 1.1, 2001, dtype=torch.float64)
    value = penalized_surrogate(ratio, torch.full_like(ratio, difference), clip_range=0.03)
    assert ratio[value.argmin()].item() == pytest.approx(1 + 0.03 * np.sign(difference), abs=1e-4)


def test_a_pair_with_equal_rewards_teaches_nothing():
    s = sample(moved=0.1)
    value, _ = LOSS.loss(s, FDFOConfig())
    value[3].backward()
    assert (s.model_pred.grad == 0).all()
    with pytest.raises(ValueError, match="the other image of each pair"):
        LOSS.loss(ForwardSample(*[s.latents] * 3, s.sigmas, s.advantages, s.latents), FDFOConfig())


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.99, 1.0])
def test_churn_stays_on_the_marginal_distribution(sigma):
    """(1 - r) x0 + r n becomes (1 - s) x0 + s n' with n' of unit variance."""
    churn = 0.03
    r = level_before(sigma, churn)
    assert r <= sigma
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    of_image = churned((1 - r) * one, zero, r, churn)
    of_noise = torch.stack([churned(r * one, zero, r, churn), churned(zero, one, r, churn)])
    torch.testing.assert_close(of_image, (1 - sigma) * one)
    torch.testing.assert_close(of_noise.square().sum(0).sqrt(), sigma * one)


def test_differences_are_those_of_pairs():
    """Means over a group cancel, and a pair without a reward has none."""
    advantages = torch.tensor([1.5, 0.5, -3.0, -1.0, 2.0, 0.0])
    valid = torch.tensor([True, True, True, True, True, False])
    difference, both = differences(advantages, valid)
    assert difference.tolist() == [0.5, -0.5, -1.0, 1.0, 0.0, 0.0]
    assert both.tolist() == [True] * 4 + [False] * 2
    assert first_of_pairs([7, 8, 9, 10]) == [7, 7, 9, 9]


FDFO = {"algorithm": {"type": "fdfo", "timesteps_per_image": 2, "kl_timesteps": 1}}


def test_images_of_a_pair_branch_from_one_noise(tmp_path):
    run = trainer(tmp_path, **FDFO)
    rollout = run.rollout(run.plan(1), 1)
    start = rollout.trajectory.latents[:, 0].float()
    within = (start[::2] - start[1::2]).square().mean().sqrt()
    between = (start[:-2:2] - start[2::2]).square().mean().sqrt()
    # two draws of unit noise with a share of 1 / 1.03^2 in common
    assert within == pytest.approx((2 * (1 - 1 / 1.03**2)) ** 0.5, rel=0.1)
    assert between == pytest.approx(2**0.5, rel=0.1)
    assert start.square().mean() == pytest.approx(1, rel=0.1)
    assert isinstance(run.policy_update.sampler(1), PairedStates)
    batch, row = run.make_batch(run.plan(1), rollout)
    assert torch.equal(batch.partner[::2], batch.latents[1::2])
    torch.testing.assert_close(batch.advantages[::2], -batch.advantages[1::2])
    assert row["kept"] == len(batch.image) == 12


@pytest.mark.slow
def test_the_reward_rises(tmp_path):
    run = trainer(
        tmp_path,
        rollout={"group_size": 2, "prompts_per_update": 16},
        optimizer={"learning_rate": 0.03},
        training={"micro_batch_size": 32, "updates_per_rollout": 2},
        **FDFO,
    )
    assert run.policy_update.rollout_policy == lora.LAGGED
    rows = [run.train_update() for _ in range(8)]
    first, last = (np.mean([r["reward"] for r in part]) for part in (rows[:2], rows[-2:]))
    assert last > first + rows[0]["reward_group_std"]
    assert rows[-1]["moved"] > 0


@pytest.mark.parametrize("family", ["flux", "sana"])
def test_other_families_train_with_it(tmp_path, family):
    row = trainer(tmp_path, family=family, **FDFO).train_update()
    assert row["ratio"] == 1
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("size", slow_except([5], [12, 5]))
def test_micro_batches_change_nothing_and_a_restart_goes_on(tmp_path, size):
    """An odd micro-batch splits a pair."""
    groups = {
        **FDFO,
        "rollout": {"micro_batch_size": size},
        "training": {"micro_batch_size": size, "updates_per_rollout": 2},
    }
    whole = trainer(tmp_path / "whole", **FDFO, training={"updates_per_rollout": 2})
    other = trainer(tmp_path / "other", **groups)
    rows = [[run.train_update() for _ in range(2)] for run in (whole, other)]
    assert rows[0][0]["reward"] == pytest.approx(rows[1][0]["reward"], abs=1e-3)
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=1e-3)
    other.save()
    again = trainer(tmp_path / "other", **groups)
    assert again.resume()
    for run in (other, again):
        run.train_update()
    assert torch.equal(weights(other), weights(again))


def test_an_image_without_a_reward_takes_its_pair_with_it(tmp_path):
    def broken(images, prompts, metadata):
        values = redness(images, prompts, metadata).values.copy()
        values[0] = np.nan
        return RewardOutput(values)

    row = trainer(tmp_path, broken, **FDFO, training={"drop_uninformative": False}).train_update()
    assert (row["failed_rewards"], row["kept"]) == (1, 10)
    assert np.isfinite(row["grad_norm"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"rollout": {"group_size": 3}}, "pairs of images, got 3"),
        ({"rollout": {"solver": "adams_bashforth"}}, "steps of its own"),
        ({"algorithm": {"noise": "fresh"}}, "Set it to rollout"),
        ({"algorithm": {"churn": 0}}, "must be positive"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, groups, message):
    algorithm = FDFO["algorithm"] | groups.get("algorithm", {})
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **(groups | {"algorithm": algorithm}))
