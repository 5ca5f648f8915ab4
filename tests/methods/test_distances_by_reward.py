"""The distance to the reference follows the reward in every method on the forward process."""

import pytest
import tiny_runs
import torch

from diffalign import lora
from diffalign.algorithms.advantages import optimality
from diffalign.algorithms.forward_process import ForwardLoss, matching_error
from diffalign.config import methods
from diffalign.methods.online.forward_update import LEAST_KL
from diffalign.training.sums import Sums

FORWARD = [n for n in tiny_runs.ONLINE if isinstance(methods.loss(n), ForwardLoss)]


@pytest.mark.parametrize("name", FORWARD)
def test_an_image_keeps_the_distance_in_the_share_of_its_reward(tmp_path, name):
    run = tiny_runs.trainer(
        tmp_path,
        algorithm={
            **{"type": name, "timesteps_per_image": 2, "kl_timesteps": 2, "ema_kl_beta": 0.0},
            **{"kl_beta": 0.5, "kl_by_reward": True},
        },
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    plan = run.plan(1)
    batch, _ = run.make_batch(plan, run.rollout(plan, 1))
    update, rows = run.policy_update, range(len(batch.image))
    states = update._states(batch, rows, update=1, inner=0)
    sample = update._sample(states, needs_old=False, needs_reference=True)
    share = optimality(sample.advantages, clip=update.config.advantage_clip)
    assert share.min() < 0.5 < share.max()
    least = LEAST_KL / 0.5
    distance = matching_error(sample.model_pred, sample.reference_pred)
    for factor in (1.0, 4.0):
        update.kl_factor = factor
        least = LEAST_KL / (0.5 * factor)
        wanted = (0.5 * factor * (least + share * (1 - least)) * distance)[states.picked].sum()
        kl = next(iter(update._penalties(states, sample, Sums(update.metrics, "cpu"))))
        torch.testing.assert_close(kl, wanted)
    with lora.policy(run.model.denoiser, lora.REFERENCE):
        assert update.kl_factor == 4.0


def test_every_forward_method_is_tested():
    assert {"awm", "diffusion_nft", "crd", "dgpo", "fdfo"} <= set(FORWARD)
