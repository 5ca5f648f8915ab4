"""CRD: its loss in closed form, the policy that samples its rollouts, and distances that follow the reward."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_runs
import torch

from diffalign import lora
from diffalign.algorithms import crd
from diffalign.algorithms.advantages import optimality
from diffalign.algorithms.forward_process import ForwardSample, norm_hinge, norm_ratio
from diffalign.config import ConfigError
from diffalign.config.algorithms import CRDConfig

GROUPS, SIZE = 2, 3
IMAGES = GROUPS * SIZE


def random_sample():
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, 4, 3, 3)
    latents, noise, pred, old = (torch.randn(shape, generator=generator) for _ in range(4))
    advantages = torch.tensor([9.0, 0.0, -2.5, 5.0, -9.0, 1.0])
    sigmas = torch.full((IMAGES,), 0.5)
    return ForwardSample(
        latents, latents, noise - latents, sigmas, advantages, pred.requires_grad_(), old
    )


def with_group_mean(sample, config):
    means = crd.gap(sample, config).detach().view(GROUPS, SIZE).mean(1)
    return replace(sample, group_mean=means.repeat_interleave(SIZE))


def test_advantages_become_optimality():
    values = optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0]), clip=5.0)
    assert values.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


def test_the_loss_is_the_papers_written_out():
    config = CRDConfig(beta=2.0)
    sample = random_sample()
    value, metrics = crd.loss(with_group_mean(sample, config), config)
    expected = []
    for group in range(GROUPS):
        rows = range(group * SIZE, (group + 1) * SIZE)
        reward, target = [], []
        for i in rows:
            v, gaps = sample.target[i], {}
            for name, pred in (("new", sample.model_pred[i]), ("old", sample.old_pred[i])):
                gap = pred.detach() - v
                gaps[name] = (gap.square().mean() / gap.abs().mean().clamp(min=1e-5)).item()
            reward.append(gaps["old"] - gaps["new"])
            target.append(np.clip(sample.advantages[i].item(), -5, 5) / 10 + 0.5)
        r, a = np.array(reward), np.array(target)
        expected += list(5 / 2 * (2 * (r - r.mean()) - (a - a.mean())) ** 2)
    assert value.tolist() == pytest.approx(expected, rel=1e-4)
    assert metrics["implicit_reward"].shape == (IMAGES,)


def test_the_gradient_pulls_the_better_image_closer():
    """At the old policy the loss of each image falls with its error where its optimality is above the mean."""
    config = CRDConfig()
    sample = random_sample()
    sample = replace(sample, old_pred=sample.model_pred.detach().clone())
    value, metrics = crd.loss(with_group_mean(sample, config), config)
    assert metrics["implicit_reward"].abs().max() < 1e-6
    value.sum().backward()
    towards = sample.target - sample.model_pred.detach()
    slope = (sample.model_pred.grad * towards).flatten(1).sum(1).view(GROUPS, SIZE)
    share = optimality(sample.advantages, clip=5.0).view(GROUPS, SIZE)
    centred = share - share.mean(1, keepdim=True)
    assert torch.equal(slope.sign(), -centred.sign())


def test_what_the_loss_needs_is_not_left_out():
    sample = random_sample()
    with pytest.raises(ValueError, match="mean over the images"):
        crd.loss(sample, CRDConfig())
    with pytest.raises(ValueError, match="old policy"):
        crd.implicit_reward(replace(sample, old_pred=None))
    with pytest.raises(ConfigError, match="algorithm.sampler_max"):
        CRDConfig(sampler_max=1.0)


def test_the_sampler_follows_at_first_and_lags_later():
    config = CRDConfig()
    decays = [config.sampler_decay(update) for update in (1, 75, 77, 1000)]
    assert decays == [0.0, 0.0, pytest.approx(0.015), 0.999]


def flat(run, policy):
    state = lora.adapter_state(run.model.denoiser, policy)
    return torch.cat([state[name].flatten().float() for name in sorted(state)])


def test_a_run_samples_with_a_policy_of_its_own_and_resumes(tmp_path):
    algorithm = {"type": "crd", "timesteps_per_image": 2, "sampler_start": 1, "sampler_ramp": 0.5}
    run = tiny_runs.trainer(tmp_path, algorithm=algorithm)
    assert run.policies == (lora.LAGGED, lora.AVERAGED, lora.SAMPLER)
    assert run.policy_update.rollout_policy == lora.SAMPLER
    row = run.train_update()
    assert {"implicit_reward", "optimality", "kl", "norm_ratio"} <= row.keys()
    # the first update has decay 0 for the sampler, and 0.255 for the old policy
    assert torch.equal(flat(run, lora.SAMPLER), flat(run, lora.CURRENT))
    assert not torch.equal(flat(run, lora.LAGGED), flat(run, lora.CURRENT))
    before = flat(run, lora.SAMPLER)
    run.train_update()
    expected = 0.5 * before + 0.5 * flat(run, lora.CURRENT)
    torch.testing.assert_close(flat(run, lora.SAMPLER), expected)
    run.save()
    again = tiny_runs.trainer(tmp_path, algorithm=algorithm)
    assert again.resume()
    assert torch.equal(flat(again, lora.SAMPLER), flat(run, lora.SAMPLER))


def test_a_norm_has_a_hinge_above_the_references():
    reference = torch.ones(3, 4, 2, 2)
    pred = torch.stack([0.5 * reference[0], reference[1], 1.5 * reference[2]])
    ratio = norm_ratio(pred, reference)
    assert ratio.tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert norm_hinge(ratio).tolist() == pytest.approx([0.0, 0.0, 0.25])


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_the_guard_costs_a_forward_only_beside_a_guided_reference(tmp_path, guidance):
    rows = {}
    for weight in (0.0, 10.0):
        run = tiny_runs.trainer(
            tmp_path / str(weight),
            algorithm={"reference_guidance_scale": guidance, "norm_guard": weight},
        )
        rows[weight] = run.train_update()
    assert ("norm_ratio" in rows[0.0]) == (guidance is None)
    assert rows[10.0]["norm_ratio"] == pytest.approx(1.0, abs=1e-3)
    costs = [rows[weight]["forwards_per_image"] for weight in (0.0, 10.0)]
    assert (costs[0] == costs[1]) == (guidance is None)


def test_distances_can_follow_the_reward(tmp_path):
    """The gradient of the distance to the reference shrinks where no image is better than the others."""
    norms = {}
    for by_reward in (False, True):
        run = tiny_runs.trainer(
            tmp_path / str(by_reward),
            algorithm={"kl_beta": 1e3, "ema_kl_beta": 0.0, "kl_by_reward": by_reward},
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        plan = run.plan(1)
        batch, _ = run.make_batch(plan, run.rollout(plan, 1))
        batch = replace(batch, advantages=torch.full_like(batch.advantages, -9.0))
        run.optimizer.zero_grad()
        run.policy_update.accumulate(batch, update=1)
        norms[by_reward] = torch.cat([p.grad.flatten() for p in run.parameters]).norm()
    assert norms[True] < 0.1 * norms[False]
