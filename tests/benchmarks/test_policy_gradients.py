"""bench awm's causes: the signal in policy gradients, by closed forms and on tiny runs."""

import pytest
import torch
from tiny_runs import trainer

from benchmarks.awm import arms as awm_arms
from benchmarks.awm.gradients import direction, gradients, load_policy, signal
from benchmarks.common.record import BenchOptions
from diffalign import lora
from diffalign.algorithms.timesteps import strata
from diffalign.config import differences, to_dict


def test_signal_by_hand():
    """Of (3, 1) and (3, -1): a common part of 9 - 1, a mean square of 10."""
    found = signal(torch.tensor([[3.0, 1.0], [3.0, -1.0], [3.0, 1.0]]), images=5)
    assert found.square == 10
    between = (8 + 8 + 10) / 3
    assert found.cosine == pytest.approx(between / 10)
    assert found.images == pytest.approx(5 * (10 - between) / between)


def test_images_to_signal_is_where_noise_equals_it():
    """Noise of variance s a dimension and image, D dimensions, a signal of length 1: s D images."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(400)
    mean[0] = 1.0
    images, variance = 8, 0.05
    noise = torch.randn(400, 400, generator=generator) * (variance / images) ** 0.5
    found = signal(mean + noise, images=images)
    assert found.images == pytest.approx(variance * 400, rel=0.1)
    assert abs(found.cosine - 1 / (1 + variance * 400 / images)) < 3 * found.error
    assert 0 < found.error < 0.02


def test_no_signal_is_said():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20, 50, generator=generator)
    opposite = torch.cat([noise, -noise])  # no mean, for certain
    found = signal(opposite, images=4)
    assert found.cosine < 0
    assert found.images is None
    assert direction(opposite, opposite) is None


def test_directions_are_of_expectations_and_not_of_noise():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.zeros(2, 300)
    a[0], b[0], b[1] = 1.0, 0.6, 0.8
    noise = torch.randn(600, 300, generator=generator)
    # the same noise in both: it must not count as agreement
    assert direction(a + noise, b + noise) == pytest.approx(0.6, abs=0.1)


def test_gradients_are_those_of_updates_that_are_not_made(tmp_path):
    run = trainer(tmp_path / "a", algorithm={"kl_beta": 0.0, "ema_kl_beta": 0.0})
    before = torch.cat([p.detach().flatten() for p in run.parameters])
    found = gradients(run, batches=3)
    assert torch.equal(torch.cat([p.detach().flatten() for p in run.parameters]), before)
    assert not torch.equal(found[0], found[1])
    again = trainer(tmp_path / "b", algorithm={"kl_beta": 0.0, "ema_kl_beta": 0.0})
    row = again.train_update()
    assert float(found[0].norm()) == pytest.approx(row["grad_norm"], rel=1e-5)


def test_a_run_s_checkpoint_is_the_policy(tmp_path):
    run = trainer(tmp_path / "a")
    run.train_update()
    run.save()
    other = trainer(tmp_path / "b")
    load_policy(other, run.folder.checkpoints)
    ours = lora.adapter_state(run.model.denoiser, lora.CURRENT)
    for name in (lora.CURRENT, *other.policies):
        theirs = lora.adapter_state(other.model.denoiser, name)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_causes_change_what_they_are_named_for(tmp_path):
    """And ways to draw leave the timesteps' distribution alone: every one of the grid's as likely as before."""
    options = BenchOptions(quick=False, work=tmp_path)
    ours = to_dict(awm_arms.configuration("awm", awm_arms.Arm(awm_arms.AWM), 0, options))
    for name, arm in {**awm_arms.COSTS, **awm_arms.NOISES}.items():
        theirs = awm_arms.configuration(name, arm, 0, options)
        changed = {line.partition(":")[0] for line in differences(ours, to_dict(theirs))}
        named = {o.lstrip("-").partition("=")[0] for o in arm.overrides}
        assert changed == named | {"output_dir"}, name
        if name in awm_arms.NOISES:
            c = theirs.algorithm
            parts = strata(
                theirs.rollout.num_inference_steps, c.timesteps_per_image, stop=c.timestep_stop
            )
            assert [1 / (len(parts) * len(p)) for p in parts for _ in p] == [0.25] * 4
