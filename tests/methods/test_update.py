"""The policy update: closed forms on real denoisers, any micro-batch, distances that start at zero."""

from dataclasses import replace

import pytest
import tiny
import torch

from diffalign import lora
from diffalign.algorithms import awm
from diffalign.config import AWMConfig
from diffalign.core.errors import UsageError
from diffalign.methods.online import forward_update
from diffalign.methods.online.forward_update import ForwardProcessUpdate, draw
from diffalign.methods.online.update import TrainingBatch, UpdateSettings
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampling import Sampling
from diffalign.types import Trajectory

N = 6
FAMILIES = ("flux", "sana", "sd3", "z_image")
"""Families whose latents have four channels, and all of whose adapted matrices are reached."""


@pytest.fixture(params=FAMILIES)
def model(request):
    """A tiny random model of each of FAMILIES, float32."""
    torch.manual_seed(0)
    return tiny.MODELS[request.param]()


def make_batch(model, n=N):
    generator = torch.Generator().manual_seed(0)
    return TrainingBatch(
        latents=torch.randn(n, 4, 8, 8, generator=generator),
        embeds=model.encode_prompt(["a photo of a circle", "a photo of a ring"]),
        prompt_index=torch.arange(n) % 2,
        advantages=torch.randn(n, generator=generator).clamp(-1, 1),
        image=list(range(n)),
        total=n,
        trained=n,
    )


def settings_of(model, **changes):
    scheduler = model.scheduler_at(8, (16, 16))
    values = {
        "grid": scheduler.timesteps,
        "sigmas": scheduler.sigmas,
        "guidance_scale": None,
        "micro_batch_size": 64,
        "mixed_precision": "no",
        "seed": 0,
    }
    return UpdateSettings(**(values | changes))


SETTINGS = set(UpdateSettings.__dataclass_fields__)


def make_update(model, **changes):
    """Settings of the update and of AWM by their names."""
    config = {"timesteps_per_image": 3, "kl_timesteps": 3, "advantage_clip": 1.0}
    config |= {k: v for k, v in changes.items() if k not in SETTINGS}
    settings = settings_of(model, **{k: v for k, v in changes.items() if k in SETTINGS})
    return ForwardProcessUpdate(model, AWMConfig(**config), settings, awm.LOSS)


@pytest.fixture
def policy(model):
    parameters = lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    return model, parameters


def perturb(parameters):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.2)


def gradient(policy, batch=None, **config):
    model, parameters = policy
    for p in parameters:
        p.grad = None
    sums = make_update(model, **config).accumulate(batch or make_batch(model), update=1)
    metrics = sums.means()
    return torch.cat([p.grad.flatten() for p in parameters]), metrics


def test_ratio_is_exactly_one_before_an_update(policy):
    for updates_per_rollout in (1, 2):
        _, metrics = gradient(policy, updates_per_rollout=updates_per_rollout)
        assert metrics["ratio"] == 1.0
        assert metrics["clipped"] == 0.0


def test_ratio_moves_when_the_policy_has_moved(policy):
    perturb(policy[1])
    _, metrics = gradient(policy, updates_per_rollout=2)
    assert metrics["ratio"] != 1.0


class TestNoiseOfTheRollout:
    """`noise: rollout` trains on states of the rollout itself, towards its end."""

    def batch(self, model, grid):
        generator = torch.Generator().manual_seed(5)
        states = torch.randn(N, len(grid) + 1, 4, 8, 8, generator=generator)
        batch = make_batch(model)
        return TrainingBatch(**{**vars(batch), "trajectory": Trajectory([*range(8)], states)})

    def test_the_gradient_is_that_of_a_loss_written_out_by_hand(self, policy):
        model, parameters = policy
        perturb(parameters)
        options = {"noise": "rollout", "timestep_stop": 0.75, "weight": "uniform"}
        options |= {"kl_beta": 0.0, "ema_kl_beta": 0.0}
        update = make_update(model, **options)
        batch = self.batch(model, update.grid)
        found, metrics = gradient(policy, batch, **options)
        drawn = draw(batch, range(N), update.parts, kl_timesteps=3, key=(0, 1, 0))
        for p in parameters:
            p.grad = None
        total = 0
        for i in range(N):
            for place in drawn.grid_index[i].tolist():
                sigma = update.settings.sigmas[place]
                state = batch.trajectory.latents[i : i + 1, place]
                velocity = (state - batch.latents[i : i + 1]) / sigma
                embeds = batch.embeds[batch.prompt_index[i : i + 1]]
                miss = model.predict(state, update.grid[place].expand(1), embeds) - velocity
                total = total + batch.advantages[i] * miss.square().mean() / (3 * N)
        total.backward()
        expected = torch.cat([p.grad.flatten() for p in parameters])
        assert (found - expected).norm() < 1e-3 * expected.norm()
        assert metrics["ratio"] == 1.0

    def test_states_are_those_through_which_the_stock_scheduler_goes(self, sd3):
        update = make_update(sd3, noise="rollout", timestep_stop=0.75)
        sampler = update.sampler(1)
        embeds = sd3.encode_prompt(["a photo of a ring"] * 2)
        with torch.no_grad():
            ends = [
                Sampling(sd3, embeds, Drawing(8)).draw(
                    torch.Generator().manual_seed(seed), step=sampler
                )
                for seed in (0, 1)
            ]
        found = sampler.trajectory()
        assert found.latents.shape == (4, 9, 4, 8, 8)
        torch.testing.assert_close(found.latents[:, -1], torch.cat(ends), rtol=0, atol=0)
        both = sd3.encode_prompt(["a photo of a ring"] * 4)
        for step in found.steps:
            state, sigma = found.latents[:, step], update.settings.sigmas
            with torch.no_grad():
                velocity = sd3.predict(state, update.grid[step].expand(4), both)
            after = state + (sigma[step + 1] - sigma[step]) * velocity
            torch.testing.assert_close(found.latents[:, step + 1], after, rtol=1e-4, atol=1e-5)

    def test_states_that_lead_where_the_model_says_are_refused(self, sd3):
        with pytest.raises(UsageError, match=r"algorithm\.noise=rollout.*timestep_stop=0\.75"):
            make_update(sd3, noise="rollout")


class TestOneNoiseAGroup:
    """`noise: group`: timesteps and noise are those of the prompt, the subset for the distances is the image's."""

    def test_draws_depend_on_the_prompt_alone(self, model):
        batch = make_batch(model)
        update = make_update(model)
        options = {"kl_timesteps": 1, "key": (0, 1, 0), "by_group": True}
        drawn = draw(batch, range(N), update.parts, **options)
        for values in (drawn.grid_index, drawn.noise):
            assert torch.equal(values[0], values[2])  # prompts 0 and 0
        picks = [
            draw(batch, range(N), update.parts, **(options | {"key": (0, n, 0)})).kl_pick
            for n in range(20)
        ]
        assert any(not torch.equal(p[0], p[2]) for p in picks)
        assert not torch.equal(drawn.noise[0], drawn.noise[1])
        part = draw(batch, range(2, 4), update.parts, **options)
        assert torch.equal(part.noise, drawn.noise[2:4])
        assert torch.equal(part.kl_pick, drawn.kl_pick[2:4])
        other = draw(batch, range(N), update.parts, **(options | {"key": (0, 2, 0)}))
        assert not torch.equal(other.noise, drawn.noise)

    def test_what_a_group_has_in_common_adds_up_to_nothing(self, policy):
        """Equal images with advantages that add up to zero: nothing is better than anything, and no noise says so."""
        perturb(policy[1])
        batch = make_batch(policy[0])
        advantages = torch.tensor([0.5, 1.0, 0.25, -0.5, -0.75, -0.5])  # of prompts 0 1 0 1 0 1
        equal = TrainingBatch(
            **{
                **vars(batch),
                "latents": batch.latents[:2].repeat(3, 1, 1, 1),
                "advantages": advantages,
            }
        )
        options = {"kl_beta": 0.0, "ema_kl_beta": 0.0, "weight": "uniform"}
        fresh, _ = gradient(policy, equal, **options)
        shared, _ = gradient(policy, equal, noise="group", **options)
        assert shared.norm() < 1e-5 * fresh.norm()

    def test_the_expected_gradient_is_that_of_noise_of_its_own(self, policy):
        """An image's own draws have the same distribution: with one image a prompt nothing else is left, and the mean
        over many updates comes out the same."""
        perturb(policy[1])
        model, parameters = policy
        options = {"kl_beta": 0.0, "ema_kl_beta": 0.0, "weight": "uniform"}
        batch = make_batch(model)
        means, errors = {}, {}
        for noise in ("fresh", "group"):
            update = make_update(model, noise=noise, **options)
            rows = []
            for number in range(1, 121):
                for p in parameters:
                    p.grad = None
                update.accumulate(batch, update=number)
                rows.append(torch.cat([p.grad.flatten() for p in parameters]))
            found = torch.stack(rows)
            means[noise] = found.mean(0)
            errors[noise] = found.var(0).sum() / len(found)
        apart = (means["fresh"] - means["group"]).square().sum()
        assert apart < 2 * (errors["fresh"] + errors["group"])  # 1 is expected
        assert means["fresh"].square().sum() > 4 * errors["fresh"]  # or it would show nothing


def test_fresh_lora_has_zero_distances_with_zero_gradient(policy):
    with_terms, metrics = gradient(policy, kl_beta=5.0, ema_kl_beta=5.0)
    without, _ = gradient(policy, kl_beta=0.0, ema_kl_beta=0.0)
    assert metrics["kl"] == metrics["kl_lagged"] == 0.0
    assert without.abs().max() > 0
    torch.testing.assert_close(with_terms, without, rtol=0, atol=0)


def test_perturbed_lora_has_distances_with_a_gradient(policy):
    perturb(policy[1])
    batch = make_batch(policy[0])
    still = TrainingBatch(**{**vars(batch), "advantages": torch.zeros(N)})
    for terms in ({"kl_beta": 1.0, "ema_kl_beta": 0.0}, {"kl_beta": 0.0, "ema_kl_beta": 1.0}):
        grad, metrics = gradient(policy, still, **terms)
        assert metrics["kl" if terms["kl_beta"] else "kl_lagged"] > 0
        assert grad.abs().max() > 0
    grad, metrics = gradient(policy, still, kl_beta=0.0, ema_kl_beta=0.0)
    assert grad.abs().max() == 0
    assert "kl" not in metrics


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5])
def test_any_micro_batch_gives_the_same_gradient(policy, micro_batch_size):
    perturb(policy[1])
    whole, first = gradient(policy, kl_beta=0.1)
    parts, second = gradient(policy, kl_beta=0.1, micro_batch_size=micro_batch_size)
    torch.testing.assert_close(parts, whole, rtol=2e-4, atol=1e-6)
    assert first == pytest.approx(second, rel=1e-4)


def test_two_shares_sum_to_the_whole(policy):
    """What two processes add up: each has half of the images, and the totals are global."""
    perturb(policy[1])
    batch = make_batch(policy[0])
    whole, _ = gradient(policy, batch, kl_beta=0.1)
    total = 0
    for rows in (slice(0, 2), slice(2, N)):
        share = TrainingBatch(
            latents=batch.latents[rows],
            embeds=batch.embeds,
            prompt_index=batch.prompt_index[rows],
            advantages=batch.advantages[rows],
            image=batch.image[rows],
            total=N,
            trained=N,
        )
        total = total + gradient(policy, share, kl_beta=0.1)[0]
    torch.testing.assert_close(total, whole, rtol=2e-4, atol=1e-6)


def test_the_reward_is_averaged_over_scored_images_and_distances_over_those_trained_on(policy):
    model, parameters = policy
    perturb(parameters)
    fewer = replace(make_batch(model), total=2 * N)

    def found(batch, beta):
        return gradient(policy, batch, kl_beta=beta, ema_kl_beta=0.0)[0]

    plain, distance = found(None, 0.0), found(None, 0.3) - found(None, 0.0)
    torch.testing.assert_close(found(fewer, 0.0), plain / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found(fewer, 0.3), plain / 2 + distance, rtol=1e-4, atol=1e-5)


def test_each_distance_is_that_to_its_own_policy(policy):
    """To the base, and to a lagged policy half the way to the base."""
    model, parameters = policy
    perturb(parameters)
    lora.blend(model.denoiser, lora.LAGGED, decay=0.5)
    _, metrics = gradient(policy, kl_beta=1.0, ema_kl_beta=1.0)
    batch, update = make_batch(model), make_update(model)
    draws = draw(batch, range(N), update.parts, kl_timesteps=3, key=(0, 1, 0))
    expected = {"kl": [], "kl_lagged": []}
    for i in range(N):
        for j in range(3):
            t = update.grid[draws.grid_index[i, j]].view(1)
            noisy = model.noise.add_noise(batch.latents[i : i + 1], draws.noise[i, j][None], t)
            embeds = batch.embeds[batch.prompt_index[i : i + 1]]
            with torch.no_grad():
                v = model.predict(noisy, t, embeds)
                for name, other in (("kl", lora.REFERENCE), ("kl_lagged", lora.LAGGED)):
                    with lora.policy(model.denoiser, other):
                        distance = (v - model.predict(noisy, t, embeds)).square().mean()
                    expected[name].append(distance.item())
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert metrics["kl"] > 1.5 * metrics["kl_lagged"] > 0


def test_the_largest_advantage_scales_the_gradient_and_no_distance(policy):
    _, parameters = policy
    perturb(parameters)

    def found(maximum, kl_beta):
        return gradient(policy, kl_beta=kl_beta, ema_kl_beta=0.0, advantage_max=maximum)[0]

    plain, distance = found(1.0, 0.0), found(1.0, 0.3) - found(1.0, 0.0)
    torch.testing.assert_close(found(3.0, 0.0), 3 * plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found(3.0, 0.3), 3 * plain + distance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", ["uniform", "ghuber"])
def test_gradient_is_the_advantage_weighted_flow_matching_gradient(policy, weight):
    """Against a loss written out by hand, without ratio, clip or exponent."""
    model, parameters = policy
    perturb(parameters)
    ours, _ = gradient(policy, kl_beta=0.0, ema_kl_beta=0.0, weight=weight)
    update = make_update(model, weight=weight)
    batch = make_batch(model)
    draws = draw(batch, range(N), update.parts, kl_timesteps=1, key=(0, 1, 0))
    for p in parameters:
        p.grad = None
    loss = 0
    for i in range(N):
        for j in range(3):
            t = update.grid[draws.grid_index[i, j]].view(1)
            x0, eps = batch.latents[i : i + 1], draws.noise[i, j].unsqueeze(0)
            noisy = (1 - t / 1000) * x0 + t / 1000 * eps
            v = model.predict(noisy, t, batch.embeds[batch.prompt_index[i : i + 1]])
            e = (v - (eps - x0)).square().mean()
            k = 1.0 if weight == "uniform" else (t / 1000) * e.detach() ** -0.75
            loss = loss + batch.advantages[i] * k * e
    (loss / (3 * N)).backward()
    expected = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(ours, expected, rtol=5e-4, atol=1e-6)


def test_distances_on_a_subset_of_the_timesteps_have_the_same_expectation(policy):
    model, parameters = policy
    perturb(parameters)
    full, _ = gradient(policy, kl_beta=1.0, ema_kl_beta=0.0)
    none, _ = gradient(policy, kl_beta=0.0, ema_kl_beta=0.0)
    batch = make_batch(model)
    update = make_update(model, kl_beta=1.0, ema_kl_beta=0.0, kl_timesteps=1)
    # every choice of one timestep, equally often: the mean must be the full term exactly
    module = forward_update
    original, total = module.draw, 0
    for chosen in range(3):

        def fixed(*args, chosen=chosen, **kwargs):
            draws = original(*args, **kwargs)
            pick = torch.full((len(draws.grid_index), 1), chosen)
            return module.Draws(draws.grid_index, draws.noise, pick)

        module.draw = fixed
        try:
            for p in parameters:
                p.grad = None
            update.accumulate(batch, update=1)
        finally:
            module.draw = original
        total = total + torch.cat([p.grad.flatten() for p in parameters]) - none
    torch.testing.assert_close(total / 3, full - none, rtol=1e-3, atol=1e-6)


def test_the_reference_can_be_guided(policy):
    """The distance is that to the base with guidance, whichever way the family computes it."""
    model, parameters = policy
    perturb(parameters)
    null = model.encode_prompt([""])
    batch = make_batch(model)
    update = make_update(model, negative_embeds=null, kl_beta=1.0, reference_guidance_scale=2.5)
    kl = update.accumulate(batch, update=1).means()["kl"]
    draws = draw(batch, range(N), update.parts, kl_timesteps=3, key=(0, 1, 0))
    expected = []
    for i in range(N):
        for j in range(3):
            t = update.grid[draws.grid_index[i, j]].view(1)
            noisy = model.noise.add_noise(batch.latents[i : i + 1], draws.noise[i, j][None], t)
            embeds = batch.embeds[batch.prompt_index[i : i + 1]]
            with torch.no_grad():
                v = model.predict(noisy, t, embeds)
                with lora.policy(model.denoiser, lora.REFERENCE):
                    guided = model.predict(
                        noisy, t, embeds, guidance_scale=2.5, negative_embeds=null
                    )
                    plain = model.predict(noisy, t, embeds)
            assert not torch.allclose(guided, plain)
            expected.append((v - guided).square().mean().item())
    assert kl == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert torch.cat([p.grad.flatten() for p in parameters]).abs().max() > 0


def test_guidance_that_costs_a_forward_is_not_trained_with(policy):
    model, _ = policy
    update = make_update(model)
    assert update.guidance_scale is None
    guided = make_update(model, guidance_scale=4.0)
    assert guided.guidance_scale == (4.0 if model.guidance_is_embedded else None)


def test_bfloat16_base_and_autocast_keep_ratio_one(policy):
    model, _ = policy
    model.pipeline.to(torch.bfloat16)
    for _, p in lora.adapter_parameters(model.denoiser, lora.CURRENT):
        p.data = p.data.float()
    grad, metrics = gradient(policy, mixed_precision="bf16", updates_per_rollout=2)
    assert metrics["ratio"] == 1.0  # the lagged policy's own forward, under autocast, too
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()
