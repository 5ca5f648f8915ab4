"""DGPO: its loss in closed form, its group mean over micro-batches and processes, and a run."""

from dataclasses import replace

import pytest
import tiny
import tiny_runs
import torch
from torch.nn.functional import softplus

from diffalign import lora
from diffalign.algorithms import dgpo
from diffalign.algorithms.forward_process import ForwardSample, matching_error
from diffalign.config import ConfigError
from diffalign.config.algorithms import DGPOConfig
from diffalign.methods.online.forward_update import ForwardProcessUpdate, draw
from diffalign.methods.online.update import TrainingBatch, UpdateSettings

GROUPS, SIZE = 2, 4
IMAGES = GROUPS * SIZE


def random_sample(*, old=None):
    """Predictions of a policy and its reference for two groups of four images."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, 4, 3, 3)
    latents, noise, pred, reference = (torch.randn(shape, generator=generator) for _ in range(4))
    advantages = torch.randn(GROUPS, SIZE, generator=generator)
    advantages = (advantages - advantages.mean(1, keepdim=True)).flatten()
    return ForwardSample(
        latents,
        latents,
        noise - latents,
        torch.full((IMAGES,), 0.5),
        advantages,
        pred.requires_grad_(),
        old,
        reference,
    )


def with_group_mean(sample, config):
    values = dgpo.group_values(sample, config).detach().view(GROUPS, SIZE)
    return replace(sample, group_mean=values.mean(1).repeat_interleave(SIZE))


def test_the_gradient_is_that_of_the_group_preference():
    """-log sigma(-S) of both groups, written out by hand, over beta."""
    config = DGPOConfig(beta=3.0)
    sample = random_sample()
    dgpo.loss(with_group_mean(sample, config), config)[0].mean().backward()
    gradient = sample.model_pred.grad.clone()

    sample.model_pred.grad = None
    error = matching_error(sample.model_pred, sample.target)
    gain = error - matching_error(sample.reference_pred, sample.target)
    total = (config.beta * (sample.advantages * gain).view(GROUPS, SIZE).mean(1)).sum()
    assert total.isfinite()
    strength = config.beta * (sample.advantages * gain).view(GROUPS, SIZE).mean(1)
    (softplus(strength).mean() / config.beta).backward()
    torch.testing.assert_close(gradient, sample.model_pred.grad)


def test_a_policy_at_its_reference_weighs_every_group_by_one_half():
    config = DGPOConfig()
    sample = random_sample()
    sample = replace(sample, reference_pred=sample.model_pred.detach())
    _, metrics = dgpo.loss(with_group_mean(sample, config), config)
    assert metrics["group_weight"].tolist() == [0.5] * IMAGES
    assert metrics["clipped"].sum() == 0


@pytest.mark.parametrize("side", [1, -1])
def test_a_policy_beyond_the_clip_has_no_gradient(side):
    """An image with a positive advantage is clipped if its error has fallen, and the other way round."""
    config = DGPOConfig(clip_range=0.2)
    sample = random_sample()
    target = sample.target
    near, far = target + 0.1, target + 2.0
    pred, old = (near, far) if side > 0 else (far, near)
    pred = pred.clone().requires_grad_()
    sample = replace(sample, model_pred=pred, old_pred=old)
    loss, metrics = dgpo.loss(with_group_mean(sample, config), config)
    loss.sum().backward()
    moved = sample.advantages * side > 0
    assert torch.equal(metrics["clipped"].bool(), moved)
    norms = pred.grad.flatten(1).norm(dim=1)
    assert (norms[moved] == 0).all()
    assert (norms[~moved] > 0).all()


def test_what_the_loss_needs_is_not_left_out():
    sample = random_sample()
    with pytest.raises(ValueError, match="mean over the images"):
        dgpo.loss(sample, DGPOConfig())
    with pytest.raises(ValueError, match="reference"):
        dgpo.group_values(replace(sample, reference_pred=None), DGPOConfig())


def test_settings_out_of_range_are_refused():
    for name, value in (("beta", 0.0), ("clip_range", 1.0), ("clip_range", 0.0)):
        with pytest.raises(ConfigError, match=f"algorithm.{name}"):
            DGPOConfig(**{name: value})


@pytest.fixture(scope="module")
def model():
    return tiny.MODELS["sd3"]()


@pytest.fixture(scope="module")
def policy(model):
    """A policy that has left its reference."""
    parameters = lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return parameters


def training_batch(model):
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, *model.latent_shape((16, 16)))
    return TrainingBatch(
        latents=torch.randn(shape, generator=generator),
        embeds=model.encode_prompt(["a photo of a circle", "a photo of a ring"]),
        prompt_index=torch.arange(GROUPS).repeat_interleave(SIZE),
        advantages=random_sample().advantages,
        image=list(range(IMAGES)),
        total=IMAGES,
        trained=IMAGES,
    )


def make_update(model, *, micro_batch_size=64, sum_processes=None, **config):
    scheduler = model.scheduler_at(8, (16, 16))
    settings = UpdateSettings(
        grid=scheduler.timesteps,
        sigmas=scheduler.sigmas,
        guidance_scale=None,
        micro_batch_size=micro_batch_size,
        mixed_precision="no",
        seed=0,
        **({} if sum_processes is None else {"sum_processes": sum_processes}),
    )
    config = DGPOConfig(timesteps_per_image=3, kl_beta=0.0, **config)
    return ForwardProcessUpdate(model, config, settings, dgpo.LOSS)


def gradient(update, batch, parameters):
    for parameter in parameters:
        parameter.grad = None
    update.accumulate(batch, update=1)
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def test_the_gradient_of_an_update_is_that_of_a_loss_written_out_by_hand(model, policy):
    update, batch = make_update(model), training_batch(model)
    ours = gradient(update, batch, policy)
    draws = draw(batch, range(IMAGES), update.parts, kl_timesteps=1, key=(0, 1, 0), by_group=True)
    for parameter in policy:
        parameter.grad = None
    total = torch.zeros(())
    for group in range(GROUPS):
        rows = torch.arange(group * SIZE, (group + 1) * SIZE)
        for step in range(3):
            noise = draws.noise[rows, step]
            # the images of a group share noise and timesteps
            assert torch.equal(noise, noise[:1].expand_as(noise))
            times = update.grid[draws.grid_index[rows, step]]
            noisy = model.noise.add_noise(batch.latents[rows], noise, times)
            target = model.noise.target(batch.latents[rows], noise, times)
            embeds = batch.embeds[batch.prompt_index[rows]]
            with torch.no_grad(), lora.policy(model.denoiser, lora.REFERENCE):
                reference = matching_error(model.predict(noisy, times, embeds), target)
            error = matching_error(model.predict(noisy, times, embeds), target)
            strength = (batch.advantages[rows] * (error - reference)).mean()
            total = total + softplus(100 * strength) / 100 / (GROUPS * 3)
    total.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy])
    assert (ours - expected).norm() < 1e-3 * expected.norm()


def test_neither_micro_batches_nor_processes_change_the_gradient(model, policy):
    """Micro-batches cut groups apart, and so do the shares of two processes."""
    batch = training_batch(model)
    whole = gradient(make_update(model), batch, policy)
    for size in (1, 3, 5):
        part = gradient(make_update(model, micro_batch_size=size), batch, policy)
        assert (part - whole).norm() < 1e-4 * whole.norm()

    shares = [range(0, 5), range(5, IMAGES)]
    locals_ = [
        replace(
            batch,
            latents=batch.latents[rows],
            prompt_index=batch.prompt_index[rows],
            advantages=batch.advantages[rows],
            image=list(rows),
        )
        for rows in shares
    ]
    tables = []
    for local in locals_:
        update = make_update(model, sum_processes=lambda table: tables.append(table) or table)
        update.begin_step(local, update=1, inner=0)
    total = tables[0] + tables[1]
    parts = [
        gradient(make_update(model, sum_processes=lambda table: total), local, policy)
        for local in locals_
    ]
    assert (sum(parts) - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_moves_away_from_the_even_weight(tmp_path, steps):
    run = tiny_runs.trainer(
        tmp_path,
        algorithm={"type": "dgpo", "timesteps_per_image": 2, "kl_beta": 0.01},
        training={"updates_per_rollout": steps},
    )
    # a second optimizer step on a rollout needs the policy that sampled it
    assert run.policy_update.rollout_policy == (lora.LAGGED if steps > 1 else lora.CURRENT)
    rows = [run.train_update() for _ in range(2)]
    assert {"group_weight", "clipped", "error", "kl"} <= rows[0].keys()
    assert (rows[0]["group_weight"] == 0.5) == (steps == 1)
    assert rows[1]["group_weight"] != 0.5
    assert (rows[0]["clipped"] > 0) == (steps > 1)
    assert all(row["grad_norm"] > 0 for row in rows)
