"""Solvers of the rollout against a flow that is known in closed form."""

import math

import pytest
import tiny_runs
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffalign.config import SOLVERS
from diffalign.core.errors import UserError
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.solvers import AdamsBashforth, solver_step

STD = 0.5


def velocity(x, sigma):
    """Of the probability flow that turns N(0, 1) into N(0, STD^2): x scales with the marginal's standard deviation."""
    return x * (sigma - (1 - sigma) * STD**2) / ((1 - sigma) ** 2 * STD**2 + sigma**2)


def error(scheduler, step=None):
    """Distance from the exact end of the path that starts at 1."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        v = velocity(x, float(t) / 1000)
        x = step(i, v, x, scheduler, None) if step else scheduler.step(v, t, x)[0]
    return abs(x.item() - STD)


def euler(n):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    return scheduler


def test_every_name_of_a_recipe_is_a_solver():
    assert {name: type(solver_step(name, RectifiedFlow())).__name__ for name in SOLVERS} == {
        "default": "NoneType",
        "adams_bashforth": "AdamsBashforth",
    }


def test_second_order():
    coarse, fine = (error(euler(n), AdamsBashforth()) for n in (32, 64))
    assert math.log2(coarse / fine) > 1.8
    coarse, fine = (error(euler(n)) for n in (32, 64))
    assert 0.9 < math.log2(coarse / fine) < 1.1


@pytest.mark.parametrize("n", [4, 6, 8, 12, 16, 32])
def test_closer_than_euler_and_a_library_solver_at_few_steps(n):
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    unipc.set_timesteps(n)
    ours = error(euler(n), AdamsBashforth())
    assert ours < 0.7 * error(euler(n))
    if n < 32:
        assert ours < 0.8 * error(unipc)


def test_twelve_steps_are_as_exact_as_64_of_euler():
    assert error(euler(12), AdamsBashforth()) < error(euler(64))


def test_exact_where_the_velocity_is_linear_in_sigma():
    scheduler = euler(5)
    step, x = AdamsBashforth(), torch.zeros(1)
    sigmas = scheduler.sigmas
    for i in range(5):
        x = step(i, 2 * sigmas[i].view(1), x, scheduler, None)
    first = 2 * sigmas[0] * (sigmas[1] - sigmas[0])  # Euler's
    assert x.item() == pytest.approx((first - sigmas[1] ** 2).item(), rel=1e-5)


def test_batches_do_not_remember_each_other(model):
    prompts = ["a photo of a red circle", *["a photo of two blue squares"] * 2]

    def latents(micro_batch_size):
        drawing = Drawing(
            num_inference_steps=4,
            solver="adams_bashforth",
            micro_batch_size=micro_batch_size,
            mixed_precision="no",
        )
        return Sampler(model, drawing).images(prompts, [5, 6, 7]).latents

    torch.testing.assert_close(latents(3), latents(1), rtol=1e-4, atol=1e-5)


def test_a_run_rolls_out_with_it(tmp_path):
    plain = tiny_runs.trainer(tmp_path / "a")
    fast = tiny_runs.trainer(tmp_path / "b", rollout={"solver": "adams_bashforth"})
    assert plain.train_update()["reward"] != fast.train_update()["reward"]


def test_flow_grpo_refuses_it(tmp_path):
    with pytest.raises(UserError, match="rollout.solver"):
        tiny_runs.trainer(
            tmp_path, algorithm={"type": "flow_grpo"}, rollout={"solver": "adams_bashforth"}
        )
