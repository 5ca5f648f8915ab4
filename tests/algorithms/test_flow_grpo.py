"""Flow-GRPO: closed forms of its steps and ratios, and updates on trajectories of tiny models."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny_runs import trainer

from diffalign import lora
from diffalign.algorithms import flow_grpo
from diffalign.algorithms.surrogate import clipped_surrogate
from diffalign.config import ConfigError, FlowGRPOConfig
from diffalign.core.errors import UsageError
from diffalign.methods.online.trajectory_update import StochasticSampler, TrajectoryUpdate
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampling import Sampling
from diffalign.training.plan import make_plan
from diffalign.types import RewardOutput


def case(n=5, t=0.8, after=0.6):
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, 4, 3, 3, generator=generator) for _ in range(2))
    return v, x, torch.full((n,), t), torch.full((n,), after)


@pytest.mark.parametrize("dynamics", ["sde", "cps"])
def test_without_noise_a_step_is_eulers(dynamics):
    v, x, t, after = case()
    step = flow_grpo.stochastic_step(v, x, t, after, noise_level=0.0, dynamics=dynamics)
    torch.testing.assert_close(step.mean, x - 0.2 * v)
    assert step.std.abs().max() == 0


def test_sde_closed_form():
    # a = 0.5, t = 0.8, D = 0.2: s = 0.5 * sqrt(0.8 / 0.2) = 1, so mu = x (1 - 0.2 / 1.6) - v (1 + 0.2 / 1.6) 0.2
    v, x, t, after = case()
    step = flow_grpo.stochastic_step(v, x, t, after, noise_level=0.5)
    torch.testing.assert_close(step.mean, 0.875 * x - 0.225 * v)
    torch.testing.assert_close(step.std, torch.full((5,), 0.2**0.5))
    torch.testing.assert_close(step.diffusion, torch.ones(5))


def test_the_first_step_from_pure_noise_is_finite():
    v, x, t, after = case(t=1.0, after=0.75)
    step = flow_grpo.stochastic_step(v, x, t, after, noise_level=0.7)
    torch.testing.assert_close(step.diffusion, torch.full((5,), 0.7 * (1 / 0.25) ** 0.5))
    assert step.mean.isfinite().all()


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 0.9])
def test_cps_keeps_the_noise_level_of_the_grid(noise_level):
    """With the true x_0 and eps the new latents are (1 - t') x_0 + t' noise: kept and fresh noise add up to t'^2."""
    v, x, t, after = case()
    step = flow_grpo.stochastic_step(v, x, t, after, noise_level=noise_level, dynamics="cps")
    x0, eps = x - 0.8 * v, x + 0.2 * v
    kept = ((step.mean - 0.4 * x0) / eps).flatten()
    torch.testing.assert_close(kept, kept.mean().expand_as(kept), rtol=1e-3, atol=1e-4)
    assert kept.mean().item() ** 2 + step.std[0].item() ** 2 == pytest.approx(0.36, rel=1e-4)
    assert step.std[0].item() == pytest.approx(0.6 * math.sin(noise_level * math.pi / 2))


def test_sde_preserves_the_marginals_of_a_gaussian():
    """x_0 ~ N(0, c^2): the exact velocity is known, and after many small steps the variance is that of the path."""
    torch.manual_seed(0)
    c2, grid = 0.25, torch.linspace(0.9, 0.3, 601)

    def variance(t):
        return (1 - t) ** 2 * c2 + t**2

    x = torch.randn(20000, 1) * variance(grid[0]).sqrt()
    for t, after in itertools.pairwise(grid):
        v = x * (t - (1 - t) * c2) / variance(t)  # E[eps - x_0 | x_t]
        step = flow_grpo.stochastic_step(
            v, x, t.expand(len(x)), after.expand(len(x)), noise_level=0.7
        )
        x = step.mean + step.std[:, None] * torch.randn_like(x)
    assert x.var().item() == pytest.approx(variance(grid[-1]).item(), rel=0.03)


def test_log_prob_is_torchs_normal():
    v, x, t, after = case()
    step = flow_grpo.stochastic_step(v, x, t, after, noise_level=0.7)
    sample = step.mean + 0.3
    normal = torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1))
    expected = normal.log_prob(sample).flatten(1).mean(1)
    torch.testing.assert_close(flow_grpo.log_prob(sample, step), expected)
    cps = flow_grpo.stochastic_step(v, x, t, after, noise_level=0.7, dynamics="cps")
    torch.testing.assert_close(
        flow_grpo.log_prob(cps.mean + 0.3, cps, dynamics="cps"), torch.full((5,), -0.09)
    )


def test_gradient_on_policy_is_the_policy_gradient():
    v, x, t, after = case()
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, -0.1])
    v.requires_grad_()
    step = flow_grpo.stochastic_step(v, x, t, after, noise_level=0.7)
    sample = step.mean.detach() + step.std.view(-1, 1, 1, 1) * torch.randn_like(x)
    logs = flow_grpo.log_prob(sample, step)
    ratio = flow_grpo.log_ratio(logs, logs.detach(), step=step, old_mean=None)
    loss, metrics = clipped_surrogate(ratio, advantages, clip_range=1e-4)
    (ours,) = torch.autograd.grad(loss.sum(), v, retain_graph=True)
    (expected,) = torch.autograd.grad((-advantages * logs).sum(), v)
    torch.testing.assert_close(ours, expected)
    assert metrics["ratio"].tolist() == [1.0] * 5
    assert metrics["clipped"].sum() == 0


def test_guards_ratio_is_centred_where_the_plain_one_drifts():
    """Samples of the old policy: the plain log-ratio falls with the distance of the means, GRPO-Guard's does not."""
    torch.manual_seed(0)
    old = flow_grpo.StochasticStep(torch.zeros(4000, 8), torch.full((4000,), 0.5), torch.ones(4000))
    new = flow_grpo.StochasticStep(torch.full((4000, 8), 0.3), old.std, old.diffusion)
    sample = old.mean + 0.5 * torch.randn(4000, 8)
    logs, old_logs = flow_grpo.log_prob(sample, new), flow_grpo.log_prob(sample, old)
    plain = flow_grpo.log_ratio(logs, old_logs, step=new, old_mean=None)
    guarded = flow_grpo.log_ratio(logs, old_logs, step=new, old_mean=old.mean)
    assert plain.mean().item() == pytest.approx(-0.09 / (2 * 0.25), abs=0.02)
    assert abs(guarded.mean().item()) < 0.01


def test_reference_distance_is_the_kl_of_the_steps_times_delta():
    v, x, t, after = case()
    step = flow_grpo.stochastic_step(v, x, t, after, noise_level=0.7)
    other = flow_grpo.stochastic_step(v + 0.1, x, t, after, noise_level=0.7)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1)),
        torch.distributions.Normal(other.mean, other.std.view(-1, 1, 1, 1)),
    )
    torch.testing.assert_close(
        flow_grpo.reference_distance(step, other), kl.flatten(1).mean(1) * 0.2
    )
    assert flow_grpo.reference_distance(step, step).abs().max() == 0


GRPO = {"type": "flow_grpo", "kl_beta": 0.01}


def perturb(run, scale=0.05):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(torch.randn_like(parameter) * scale)


@pytest.mark.parametrize("dynamics", ["sde", "cps"])
def test_a_trajectory_is_scored_by_the_policy_that_made_it(tmp_path, dynamics):
    steps = {"num_inference_steps": 6, "group_size": 16}
    run = trainer(tmp_path, rollout=steps, algorithm={**GRPO, "dynamics": dynamics})
    perturb(run)
    plan = make_plan(run.prompts, run.config.rollout, seed=0, update=1, tasks=run.config.prompts)
    rollout = run.rollout(plan, 1)
    trajectory = rollout.trajectory
    count = len(trajectory.steps)
    assert trajectory.steps == list(range(count))
    assert trajectory.latents.shape == (48, count + 1, 4, 8, 8)
    for k in (
        trajectory.steps
    ):  # what the policy did there is standard normal, once its own mean is taken off
        t, after = (run.policy_update.sigmas[j].expand(48) for j in (k, k + 1))
        with torch.no_grad():
            pred = run.model.predict(
                trajectory.latents[:, k], t * 1000, rollout.embeds[rollout.prompt_index]
            )
        step = flow_grpo.stochastic_step(
            pred, trajectory.latents[:, k], t, after, noise_level=0.7, dynamics=dynamics
        )
        z = (trajectory.latents[:, k + 1] - step.mean) / step.std.view(-1, 1, 1, 1)
        assert abs(z.mean().item()) < 0.05
        assert z.std().item() == pytest.approx(1, abs=0.05)
    batch, _ = run.make_batch(plan, rollout)
    first = run.policy_update.accumulate(batch, update=1).means()
    again = run.policy_update.accumulate(batch, update=1, inner=1).means()
    assert first["ratio"] == again["ratio"] == 1.0
    perturb(run, 0.02)
    moved = run.policy_update.accumulate(batch, update=1, inner=2).means()
    assert moved["ratio"] != 1.0


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("dynamics", ["sde", "cps"])
def test_the_update_scores_the_steps_that_the_sampler_made(tmp_path, monkeypatch, family, dynamics):
    """Mean, standard deviation and log-probability of each, at its own place of the grid, not at a neighbour's."""
    run = trainer(
        tmp_path,
        family=family,
        rollout={"num_inference_steps": 8, "micro_batch_size": 5},
        algorithm={**GRPO, "kl_beta": 0.0, "dynamics": dynamics, "window_size": 2},
        training={"drop_uninformative": False},
    )
    perturb(run, 0.2)
    update = next(n for n in range(1, 50) if run.policy_update.sampler(n).window.start)
    steps, original = [], flow_grpo.stochastic_step

    def recorded(*args, **kwargs):
        steps.append(original(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(flow_grpo, "stochastic_step", recorded)
    plan = run.plan(update)
    rollout = run.rollout(plan, update)
    of_sampler = [  # micro-batches of 5, 5 and 2 images, two steps each
        flow_grpo.StochasticStep(
            *(torch.cat([getattr(s, name) for s in steps[k::2]]) for name in names)
        )
        for names in [("mean", "std", "diffusion")]
        for k in range(2)
    ]
    steps.clear()
    batch, _ = run.make_batch(plan, rollout)
    run.policy_update.accumulate(batch, update=update)
    (of_update,) = steps
    log_probs = batch.old_log_probs
    for k, made in enumerate(of_sampler):
        torch.testing.assert_close(of_update.mean[k::2], made.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_update.std[k::2], made.std)
        after = rollout.trajectory.latents[:, k + 1]
        expected = flow_grpo.log_prob(after, made, dynamics=dynamics)
        torch.testing.assert_close(log_probs[:, k], expected, rtol=1e-3, atol=1e-4)


def test_both_terms_are_means_over_the_images_that_are_trained_on(tmp_path):
    """Against the release's loss written out by hand: images without an advantage are in neither mean."""
    values = np.array([0, 0, 1, 1] + [0.5] * 4 + [0, 0.5, 0.5, 1], np.float32)

    def score(images, prompts, metadata):
        return RewardOutput(values)

    algorithm = {"type": "flow_grpo", "kl_beta": 0.5, "window_size": 2}
    rollout = {"num_inference_steps": 6}
    run = trainer(tmp_path, score=score, algorithm=algorithm, rollout=rollout)
    perturb(run)
    plan = run.plan(1)
    batch, row = run.make_batch(plan, run.rollout(plan, 1))
    assert batch.image == [0, 1, 2, 3, 8, 11]
    assert row["kept"] == 6
    # some of them beyond advantage_clip
    batch = replace(batch, advantages=batch.advantages * 4)
    assert batch.advantages.abs().max() > 5
    run.optimizer.zero_grad()
    run.policy_update.accumulate(batch, update=1)
    ours = torch.cat([p.grad.flatten() for p in run.parameters])

    run.optimizer.zero_grad()
    sigmas, trajectory = run.policy_update.sigmas, batch.trajectory
    losses = []
    for row, advantage in enumerate(batch.advantages):
        for k, number in enumerate(trajectory.steps):
            x, after = trajectory.latents[row, k : k + 2].split(1)
            t, following = sigmas[number : number + 1], sigmas[number + 1 : number + 2]
            embeds = batch.embeds[batch.prompt_index[row : row + 1]]

            def step(x=x, t=t, following=following, embeds=embeds):
                pred = run.model.predict(x, t * 1000, embeds)
                return flow_grpo.stochastic_step(pred, x, t, following, noise_level=0.7)

            made = step()
            with torch.no_grad(), lora.policy(run.model.denoiser, lora.REFERENCE):
                reference = step()
            log_prob = flow_grpo.log_prob(after, made)
            ratio = (log_prob - log_prob.detach()).exp()
            distance = flow_grpo.reference_distance(made, reference)
            losses.append(-advantage.clamp(-5, 5) * ratio + 0.5 * distance)
    torch.cat(losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in run.parameters])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_distance_to_the_reference_has_a_value_and_a_gradient(tmp_path):
    run = trainer(tmp_path, algorithm={**GRPO, "kl_beta": 1.0, "window_size": 1})
    plan = make_plan(run.prompts, run.config.rollout, seed=0, update=1, tasks=run.config.prompts)
    batch, _ = run.make_batch(plan, run.rollout(plan, 1))
    still = replace(batch, advantages=torch.zeros_like(batch.advantages))
    norms = []
    for _ in range(2):
        run.optimizer.zero_grad()
        kl = run.policy_update.accumulate(still, update=1).means()["kl"]
        grads = [p.grad.flatten() for p in run.parameters if p.grad is not None]
        norms.append((kl, torch.cat(grads).norm().item()))
        perturb(run)
    assert norms[0] == (0.0, 0.0)
    assert norms[1][0] > 0 < norms[1][1]


def test_windows_move_and_stay_where_noise_can_be_removed(tmp_path):
    rollout = {"num_inference_steps": 10}
    run = trainer(
        tmp_path, rollout=rollout, algorithm={**GRPO, "window_size": 3, "window_stop": 0.5}
    )
    windows = {run.policy_update.sampler(update).window for update in range(40)}
    assert windows == {range(0, 3), range(1, 4), range(2, 5)}
    for dynamics, stops in (("sde", range(5, 9)), ("cps", [9])):
        every = trainer(tmp_path, rollout=rollout, algorithm={**GRPO, "dynamics": dynamics})
        window = every.policy_update.sampler(1).window
        assert window.start == 0
        assert window.stop in stops
    with pytest.raises(UsageError, match="do not fit"):  # a step before the last has too much noise
        trainer(tmp_path, rollout=rollout, algorithm={**GRPO, "window_size": 9})


@pytest.mark.parametrize("dynamics", ["sde", "cps"])
def test_no_noise_is_left_in_the_images(tmp_path, dynamics):
    """With the velocity of a Gaussian world, whose images have a known variance, on SD3's own grid."""
    run = trainer(
        tmp_path,
        rollout={"num_inference_steps": 10},
        algorithm={**GRPO, "dynamics": dynamics},
    )
    c2 = 0.01

    def velocity(noisy, timesteps, *args, **kwargs):
        t = (timesteps / 1000).view(-1, 1, 1, 1)
        return noisy * (t - (1 - t) * c2) / ((1 - t) ** 2 * c2 + t**2)

    run.model.predict = velocity
    embeds = run.rollouts.sampler.embed(["a photo of a circle"])[torch.zeros(64, dtype=torch.long)]

    def spread(step):
        generator = torch.Generator().manual_seed(0)
        batch = Sampling(run.model, embeds, Drawing(num_inference_steps=10))
        made = batch.draw(generator, step=step)
        return made.std().item()

    ours = spread(run.policy_update.sampler(1))
    assert ours < 1.5 * c2**0.5
    if dynamics == "sde":  # all steps but the last, as in the release, leave noise
        assert spread(StochasticSampler(run.config.algorithm, range(9))) > 2 * c2**0.5


def test_no_noise_outside_the_window(tmp_path):
    """One stochastic step, the second: what comes before it and after it are the scheduler's own."""
    rollout = {"num_inference_steps": 6}
    run = trainer(tmp_path, rollout=rollout, algorithm={**GRPO, "window_size": 1})
    sampler = StochasticSampler(run.config.algorithm, range(1, 2))
    run.policy_update.sampler = lambda update: sampler
    plan = make_plan(run.prompts, run.config.rollout, seed=0, update=1, tasks=run.config.prompts)
    made = run.rollout(plan, 1)
    embeds = made.embeds[made.prompt_index]
    scheduler = run.model.scheduler_at(6, (tiny.SIZE, tiny.SIZE))
    generators = [torch.Generator().manual_seed(s) for s in plan.seeds]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
    for i, t in enumerate(scheduler.timesteps):
        if i == 1:
            torch.testing.assert_close(made.trajectory.latents[:, 0], x, rtol=1e-4, atol=1e-5)
            x = made.trajectory.latents[:, 1]
            scheduler._step_index = 2
            continue
        with torch.no_grad():
            pred = run.model.predict(x, t.expand(len(x)), embeds)
        x = scheduler.step(pred, t, x, return_dict=False)[0]
    torch.testing.assert_close(made.latents, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guard", [False, True])
def test_the_reward_rises(tmp_path, guard):
    run = trainer(
        tmp_path,
        rollout={"group_size": 8, "prompts_per_update": 4, "num_inference_steps": 4},
        optimizer={"learning_rate": 0.03},
        algorithm={**GRPO, "guard": guard, "clip_range": 1e-2},
        training={"micro_batch_size": 64, "updates_per_rollout": 2},
    )
    assert run.policy_update.rollout_policy == lora.CURRENT
    rows = [run.train_update() for _ in range(10)]
    first, last = (np.mean([r["reward"] for r in part]) for part in (rows[:2], rows[-2:]))
    assert last > first + rows[0]["reward_group_std"]
    assert any(r["clipped"] > 0 for r in rows)


def test_micro_batches_change_nothing(tmp_path):
    runs = [
        trainer(
            tmp_path / str(size),
            algorithm=GRPO,
            rollout={"micro_batch_size": size},
            training={"micro_batch_size": size, "updates_per_rollout": 2},
        )
        for size in (12, 5)
    ]
    for _ in range(2):
        for run in runs:
            run.train_update()
    states = [
        torch.cat([p.detach().flatten() for p in lora.trainable(r.model.denoiser)]) for r in runs
    ]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


def test_guidance_by_a_second_forward_is_refused(tmp_path):
    with pytest.raises(UsageError, match="without guidance"):
        trainer(tmp_path, algorithm=GRPO, rollout={"guidance_scale": 4.0})
    with pytest.raises(ConfigError, match="merge_lora"):
        trainer(tmp_path, algorithm=GRPO, rollout={"merge_lora": True})
    with pytest.raises(ConfigError, match="solver"):
        trainer(tmp_path, algorithm=GRPO, rollout={"solver": "adams_bashforth"})
    with pytest.raises(ConfigError, match="guard"):
        FlowGRPOConfig(guard=True, dynamics="cps")
    flux = trainer(tmp_path, family="flux", algorithm=GRPO, rollout={"guidance_scale": 4.0})
    assert isinstance(flux.policy_update, TrajectoryUpdate)
    assert isinstance(flux.config.algorithm, FlowGRPOConfig)
