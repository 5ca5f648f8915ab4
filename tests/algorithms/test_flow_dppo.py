"""Flow-DPPO: steps are left out by their divergence, and only where they would move further away."""

import math

import pytest
import tiny_runs
import torch

from diffalign.algorithms import flow_dppo
from diffalign.algorithms.trajectory import StochasticStep, TrajectorySample
from diffalign.config import ConfigError
from diffalign.config.algorithms import FlowDPPOConfig


def make_sample(shift, log_ratios, advantages):
    """Steps whose means have moved by `shift` standard deviations in every dimension."""
    count = len(log_ratios)
    old_mean = torch.zeros(count, 2, 2, 2)
    std = torch.full((count,), 0.5)
    step = StochasticStep(old_mean + shift * 0.5, std, std)
    old = torch.full((count,), -1.0)
    log_probs = (old + torch.tensor(log_ratios)).requires_grad_()
    return TrajectorySample(step, log_probs, old, torch.tensor(advantages), old_mean)


def test_the_divergence_is_that_of_two_gaussians_per_dimension():
    value = flow_dppo.divergence(make_sample(0.2, [0.0], [1.0]))
    old, new = (torch.distributions.Normal(torch.tensor(m), 0.5) for m in (0.0, 0.1))
    expected = torch.distributions.kl_divergence(new, old)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("shift", "left_out"), [(1e-3, [0, 0, 0, 0]), (0.1, [1, 0, 0, 1])])
def test_steps_are_left_out_where_they_move_further_away(shift, left_out):
    """Ratios above and below 1 with advantages of both signs, near the old policy and far from it."""
    config = FlowDPPOConfig()
    sample = make_sample(shift, [0.1, -0.1, 0.1, -0.1], [1.0, 1.0, -1.0, -1.0])
    loss, metrics = flow_dppo.loss(sample, config)
    assert metrics["left_out"].tolist() == left_out
    loss.sum().backward()
    ratios = [math.exp(0.1), math.exp(-0.1)] * 2
    signs = [1.0, 1.0, -1.0, -1.0]
    expected = [
        0.0 if out else -sign * ratio
        for out, sign, ratio in zip(left_out, signs, ratios, strict=True)
    ]
    assert sample.log_probs.grad.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_run_diverges_from_its_rollouts_with_its_second_step(tmp_path):
    algorithm = {"type": "flow_dppo", "window_size": 2, "divergence_threshold": 1e-8}
    rollout = {"num_inference_steps": 6}
    run = tiny_runs.trainer(
        tmp_path, algorithm=algorithm, rollout=rollout, training={"updates_per_rollout": 2}
    )
    row = run.train_update()
    assert row["divergence"] > 0
    assert 0 < row["left_out"] < 1
    # the first step of every rollout is the old policy itself
    single = tiny_runs.trainer(tmp_path / "single", algorithm=algorithm, rollout=rollout)
    row = single.train_update()
    assert (row["divergence"], row["left_out"], row["ratio"]) == (0.0, 0.0, 1.0)


def test_a_threshold_is_positive():
    with pytest.raises(ConfigError, match="algorithm.divergence_threshold"):
        FlowDPPOConfig(divergence_threshold=0.0)
