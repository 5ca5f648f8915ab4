"""The gradient of losses on pairs: what must hold where training starts, and whatever the micro-batch."""

import math

import pytest
import tiny_pairs
import torch
from processes import results_of
from tiny_pairs import ALGORITHMS, build

from diffalign import lora
from diffalign.algorithms import preference
from diffalign.algorithms.inversion_dpo import trajectory_loss, trajectory_weight
from diffalign.core.seeds import TIMESTEPS
from diffalign.diffusion.paths import RectifiedFlow, implied_noise
from diffalign.training.sums import Sums
from diffalign.types import PreferenceBatch

KEY = (TIMESTEPS, 1)
LOG2 = math.log(2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_pairs.write_pairs(tmp_path_factory.mktemp("pairs"))


def gradient(run, pairs=range(6), *, swap=False, label=None):
    """(metrics, gradient as one vector) of a batch of pairs."""
    batch = run.cache.batch(pairs)
    if swap:
        flipped = {
            k: v.flip(1)
            for k in ("latents", "states", "reference_error")
            if (v := getattr(batch, k)) is not None
        }
        batch = PreferenceBatch(**{**vars(batch), **flipped})
    if label is not None:
        batch = PreferenceBatch(
            **{**vars(batch), "preference": torch.full_like(batch.preference, label)}
        )
    run.optimizer.zero_grad()
    baseline = torch.zeros(())
    sums = run.update.accumulate(batch, total=len(batch.pair), key=KEY, baseline=baseline)
    vector = torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])
    return sums.means(), vector.clone()


def disturb(run, scale=0.05):
    """A policy that is no longer the reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in run.parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("family", list(tiny_pairs.FAMILIES))
class TestWhereTrainingStarts:
    def test_chord_learns(self, family, source, tmp_path):
        run = build(source, tmp_path, "chord", family)
        metrics, vector = gradient(run)
        assert metrics["loss"] == pytest.approx(LOG2, abs=2e-3)
        assert metrics["error_winner"] == pytest.approx(metrics["error_winner_reference"], rel=1e-3)
        assert metrics["error_loser"] == pytest.approx(metrics["error_loser_reference"], rel=1e-3)
        assert vector.norm() > 1e-3

    @pytest.mark.parametrize("variant", ["figure", "released"])
    def test_the_published_forms_do_not(self, family, variant, source, tmp_path):
        """Their defect: a distance to the reference has no slope at the reference."""
        metrics, vector = gradient(build(source, tmp_path, variant, family))
        assert metrics["loss"] == pytest.approx(LOG2, abs=1e-6)
        assert vector.abs().max() == 0


class TestGradients:
    @pytest.mark.parametrize("name", ["chord", "dpo"])
    def test_swapping_images_flips_the_sign(self, name, source, tmp_path):
        run = build(source, tmp_path, name, algorithm={"safeguard": None})
        one, other = gradient(run)[1], gradient(run, swap=True)[1]
        torch.testing.assert_close(one, -other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))

    @pytest.mark.parametrize("name", ["chord", "dpo"])
    def test_it_is_beta_over_four_times_that_of_the_errors(self, name, source, tmp_path):
        run = build(source, tmp_path, name, algorithm={"safeguard": None})
        vector = gradient(run)[1]
        batch = run.cache.batch(range(6))
        run.optimizer.zero_grad()
        errors = run.update._errors(run.update.states(batch, KEY))[0].mean((0, 2))
        (run.config.algorithm.beta / 4 * (errors[0] - errors[1])).backward()
        expected = torch.cat([p.grad.flatten() for p in run.parameters])
        torch.testing.assert_close(
            vector, expected, rtol=2e-2, atol=1e-3 * float(expected.abs().max())
        )

    def test_a_tie_has_none_at_the_start(self, source, tmp_path):
        run = build(source, tmp_path, "dpo", algorithm={"safeguard": None})
        clear = gradient(run)[1]
        assert gradient(run, label=0.5)[1].abs().max() < 1e-3 * clear.abs().max()

    def test_the_safeguard_changes_the_gradient_and_not_the_loss(self, source, tmp_path):
        plain = build(source, tmp_path / "a", algorithm={"safeguard": None})
        guarded = build(source, tmp_path / "b", algorithm={"safeguard": 0.6})
        for run in (plain, guarded):
            disturb(run)
        (a, u), (b, v) = gradient(plain), gradient(guarded)
        assert a["loss"] == b["loss"]
        assert 0 <= b["safeguard"] < 1
        assert (u - v).norm() > 1e-3 * u.norm()

    def test_the_safeguard_scales_the_losers_error_alone(self, source, tmp_path):
        run = build(source, tmp_path, algorithm={"safeguard": 0.6})
        batch = run.cache.batch(range(6))
        states = run.update.states(batch, KEY)
        errors, model_pred = run.update._errors(states)
        errors = errors.detach().requires_grad_()
        known = run.update._reference_errors(states)
        sides = (t[:, i].flatten() for t in (errors, known) for i in range(2))
        pair = preference.PairErrors(*sides)
        factors = Sums(("safeguard",), torch.device("cpu"))
        guarded = run.update._guarded(pair, states, model_pred, factors)
        (guarded.winner + guarded.loser).sum().backward()
        assert torch.equal(errors.grad[:, 0], torch.ones_like(errors.grad[:, 0]))
        assert errors.grad[:, 1].mean().item() == pytest.approx(factors.means()["safeguard"])
        assert errors.grad[:, 1].min() < 1

    def test_sft_looks_at_the_winner_alone(self, source, tmp_path):
        run = build(source, tmp_path, "sft")
        assert run.update.sizes(6).with_gradient == {12}
        metrics, vector = gradient(run)
        assert set(metrics) == {"loss", "error_winner"}
        assert vector.norm() > 0

    def test_kto_starts_at_one_half(self, source, tmp_path):
        metrics, vector = gradient(build(source, tmp_path, "kto"))
        assert metrics["loss"] == pytest.approx(0.5, abs=1e-3)
        assert vector.norm() > 0

    def test_weights_of_pairs_multiply_their_losses(self, source, tmp_path):
        run = build(source, tmp_path)
        batch = run.cache.batch(range(6))
        double = PreferenceBatch(**{**vars(batch), "weight": 2 * batch.weight})
        sums = run.update.accumulate(double, total=6, key=KEY).means()
        assert sums["loss"] == pytest.approx(2 * LOG2, abs=4e-3)

    @pytest.mark.parametrize("name", list(ALGORITHMS))
    @pytest.mark.parametrize("size", [1, 4])
    def test_micro_batches_do_not_matter(self, name, size, source, tmp_path):
        run = build(source, tmp_path, name, family="sd")
        disturb(run)
        whole = gradient(run)
        run.update.micro_batch_size = size
        parts = gradient(run)
        torch.testing.assert_close(
            whole[1], parts[1], rtol=1e-2, atol=1e-3 * float(whole[1].abs().max())
        )
        assert whole[0]["loss"] == pytest.approx(parts[0]["loss"], rel=1e-3)


class TestStates:
    @pytest.mark.parametrize("family", ["sd3", "sd"])
    def test_both_images_share_noise_and_timesteps(self, family, source, tmp_path):
        run = build(source, tmp_path, "dpo", family)
        batch = run.cache.batch(range(4))
        states = run.update.states(batch, KEY)
        path = run.model.noise
        noisy = states.by_image(states.batch.noisy)
        latents = batch.latents[:, :, None].expand_as(noisy).flatten(0, 2)
        noise = implied_noise(path, latents, states.batch.noisy, states.batch.timesteps)
        noise = states.by_image(noise)
        torch.testing.assert_close(noise[:, 0], noise[:, 1], rtol=1e-2, atol=1e-2)
        assert (noise[:, :, 0] - noise[:, :, 1]).abs().mean() > 0.1
        again = run.update.states(batch, KEY)
        assert torch.equal(again.batch.noisy, states.batch.noisy)
        other = run.update.states(batch, (TIMESTEPS, 2))
        assert not torch.equal(other.batch.noisy, states.batch.noisy)

    def test_states_are_those_of_the_grid(self, source, tmp_path):
        run = build(source, tmp_path, "chord", "sd")
        batch = run.cache.batch(range(4))
        timesteps = run.update.states(batch, KEY).batch.timesteps
        grid = set(run.update.grid.tolist())
        assert set(timesteps.tolist()) <= grid
        assert all(float(t).is_integer() for t in timesteps)

    def test_the_release_asks_for_the_next_timestep(self, source, tmp_path):
        here = build(source, tmp_path / "a", "figure").update
        there = build(source, tmp_path / "b", "released")
        batch = there.cache.batch(range(4))
        a, b = here.states(batch, KEY).batch, there.update.states(batch, KEY).batch
        assert torch.equal(a.noisy, b.noisy)
        assert (b.timesteps >= a.timesteps).all()
        assert (b.timesteps > a.timesteps).any()


class TestTrajectoryLoss:
    def test_both_signs_negate_the_logit(self):
        winner, loser = torch.tensor([1.0, 0.2]), torch.tensor([0.5, 0.9])
        a, b = (trajectory_loss(winner, loser, beta=3.0, variant=v) for v in ("released", "figure"))
        logit = 1.5 * (winner - loser)
        torch.testing.assert_close(a - b, -logit)
        torch.testing.assert_close(a, torch.nn.functional.softplus(-logit))

    def test_weights_are_the_release_s(self, source, tmp_path):
        path = build(source, tmp_path, "chord", "sd").model.noise
        times = torch.tensor([0, 948])
        weight = trajectory_weight(path, times)
        torch.testing.assert_close(weight, 0.5 / path.alphas_cumprod[times])
        assert weight[1] / weight[0] > 100
        assert torch.equal(trajectory_weight(RectifiedFlow(), times), torch.ones(2))


class TestTraining:
    def test_every_pair_once_an_epoch(self, source, tmp_path):
        run = build(source, tmp_path, training={"pairs_per_update": 5})
        seen = [i for number in range(1, 13) for i in run.order(number)]
        for epoch in range(5):
            assert sorted(seen[12 * epoch : 12 * (epoch + 1)]) == list(range(12))
        assert seen[:12] != seen[12:24]
        assert run.order(3) == seen[10:15]

    @pytest.mark.parametrize("name", ["chord", "dpo"])
    @pytest.mark.parametrize("mu", [None, 0.6])
    def test_what_pairs_teach(self, name, mu, tmp_path):
        """Red against blue, on prompts that were never trained on. The plain loss tells them apart by making the loser
        worse, and the winner with it; the safeguard keeps the winner."""
        run = build(
            tiny_pairs.write_pairs(tmp_path / "pairs", 32),
            tmp_path,
            name,
            algorithm={"safeguard": mu},
            pairs={"validation": 0.3},
            training={"pairs_per_update": 12, "micro_batch_size": 12},
        )
        assert 5 < len(run.kept) < 15
        assert not set(run.kept) & set(run.pairs)
        for _ in range(40):
            run.train_update()
        found = {k.removeprefix("validation/"): v for k, v in run.validate().items()}
        if mu is None:
            assert found["accuracy"] >= 0.9
            assert found["margin"] > 1
            assert found["error_winner"] > found["error_winner_reference"]
        else:
            assert found["error_winner"] < found["error_winner_reference"]

    @pytest.mark.parametrize("name", ["chord", "dpo", "released"])
    def test_validation_does_not_depend_on_micro_batches(self, source, name, tmp_path):
        """Of the averaged policy throughout, whatever the reference is asked in between."""
        found = []
        for size in (1, 12):
            run = build(
                source,
                tmp_path / str(size),
                name,
                pairs={"validation": 0.5},
                training={"micro_batch_size": 12, "pairs_per_update": 4, "ema_max": 0.9},
            )
            for _ in range(2):
                run.train_update()
            assert len(run.kept) > 1
            run.update.micro_batch_size = size
            found.append(run.validate())
        assert found[0] == pytest.approx(found[1], rel=2e-3, abs=1e-6)

    def test_no_forward_of_the_reference_with_states(self, source, tmp_path):
        """2.2 forwards for each image and timestep: forward and backward; Diffusion-DPO needs one more."""
        costs = {}
        for name in ("chord", "dpo"):
            row = build(source, tmp_path / name, name).train_update()
            costs[name] = row["forwards_per_pair"]
        assert costs["chord"] == pytest.approx(2 * 2 * 2.2)
        assert costs["dpo"] == pytest.approx(2 * 2 * 3.2)

    def test_the_base_is_not_touched(self, source, tmp_path):
        run = build(source, tmp_path, "chord", "sd")
        before = {
            k: v.clone() for k, v in run.model.denoiser.state_dict().items() if "lora_" not in k
        }
        for _ in range(3):
            run.train_update()
        assert all(torch.equal(run.model.denoiser.state_dict()[k], v) for k, v in before.items())

    @pytest.mark.parametrize("name", ["chord", "dpo"])
    def test_resuming_is_bit_for_bit(self, name, source, tmp_path):
        whole = build(source, tmp_path / "a", name)
        for _ in range(4):
            whole.train_update()
        first = build(source, tmp_path / "b", name)
        for _ in range(2):
            first.train_update()
        first.save()
        second = build(source, tmp_path / "b", name)
        assert second.resume()
        for _ in range(2):
            second.train_update()
        for policy in (lora.CURRENT, lora.AVERAGED):
            a, b = (lora.adapter_state(r.model.denoiser, policy) for r in (whole, second))
            assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(source, tmp_path):
    results = [
        results_of(world, "preference_runs", tmp_path / str(world), source) for world in (1, 2)
    ]
    for name in results[0]:
        (one, losses, pairs), (two, others, same) = (r[name] for r in results)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        assert losses == pytest.approx(others, rel=1e-3)
        assert pairs == same == 12
