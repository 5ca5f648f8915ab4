"""Zero terminal signal-to-noise ratio: nothing of the image is left at the last timestep, and everything is finite."""

import pytest
import tiny
import tiny_pairs
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from diffalign.algorithms.distillation import chords, consistency_output, reflow_loss
from diffalign.algorithms.inversion_dpo import trajectory_weight
from diffalign.diffusion.inversion import integrate
from diffalign.diffusion.paths import chord_target
from diffalign.methods.preference.trainer import PreferenceTrainer
from diffalign.pipelines.sd import SDModel
from diffalign.training.run_folder import RunFolder

ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
LAST = torch.tensor([999, 500])


def zero_model(scheduler=DDIMScheduler, **changes) -> SDModel:
    pipeline = tiny.sd_pipeline()
    settings = {**ZERO, "timestep_spacing": "trailing", **changes}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
    return SDModel(pipeline, default_size=(tiny.SIZE, tiny.SIZE))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_everything_that_divides_by_the_signal_is_finite(scheduler, prediction_type):
    path = zero_model(scheduler, prediction_type=prediction_type).noise
    assert float(path.scales(LAST)[0][0]) < 3e-4
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    noisy = path.add_noise(latents, noise, LAST)
    perfect = path.target(latents, noise, LAST)
    torch.testing.assert_close(path.predict_noise(perfect, noisy, LAST), noise)
    if prediction_type == "v_prediction":
        torch.testing.assert_close(path.predict_latents(perfect, noisy, LAST), latents)
    ode = path.ode(perfect, noisy, LAST)
    line = chords(path, noisy, latents, LAST, torch.zeros(2), torch.tensor([0.0, 0.5]))
    every = [
        *(path.predict_latents(perfect, noisy, LAST), path.ode_time(LAST)),
        *(ode.state, ode.time, ode.field, line.noisy_latents, line.slope),
        *(path.from_ode(ode.state, LAST), chord_target(path, latents, noisy, LAST)),
        *(trajectory_weight(path, LAST), consistency_output(path, perfect, noisy, LAST)),
        reflow_loss(path, perfect, line),
    ]
    assert all(values.isfinite().all() for values in every)
    torch.testing.assert_close(path.from_ode(path.to_ode(noisy, LAST), LAST), noisy)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "fixed_point"])
def test_inversion_and_sampling_pass_the_end(solver):
    """Against data that are one point, whose flow is known: noise is whatever is not that point."""
    path = zero_model().noise
    point = torch.randn(1, 4, 8, 8)

    def predict(x, times):
        a, s = (v.view(-1, 1, 1, 1) for v in path.scales(times))
        return a * (x - a * point) / s - s * point

    start = path.add_noise(point, torch.randn(3, 4, 8, 8), torch.full((3,), 199))
    grid = torch.tensor([199.0, 399, 599, 799, 999])
    noise = integrate(predict, start, grid, path, solver=solver)[-1]
    a, s = (float(v) for v in path.scales(grid[:1]))
    torch.testing.assert_close(noise, (start - a * point) / s, rtol=1e-3, atol=1e-3)
    sampler = "euler" if solver == "fixed_point" else solver
    back = integrate(predict, noise, grid.flip(0), path, solver=sampler)[-1]
    torch.testing.assert_close(back, start, rtol=1e-3, atol=1e-3)


def test_sampling_by_euler_is_ddim():
    model = zero_model()
    embeds = model.encode_prompt(["a photo of a red circle"])
    scheduler = model.scheduler_at(4, (tiny.SIZE, tiny.SIZE))
    noise = torch.randn(1, 4, 8, 8)
    expected = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            model_pred = model.predict(expected, t.expand(1), embeds)
            expected = scheduler.step(model_pred, t, expected).prev_sample
    grid = torch.cat([scheduler.timesteps, torch.zeros(1)])
    found = integrate(lambda x, t: model.predict(x, t, embeds), noise, grid, model.noise)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_images_equal_the_stock_pipelines():
    model = zero_model()
    prompts = ["a photo of a red circle"]
    options = {"height": tiny.SIZE, "width": tiny.SIZE, "output_type": "np"}
    expected = model.pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images
    found = tiny.rollout(
        model, prompts, generator=torch.Generator().manual_seed(0), guidance_scale=5.0
    )
    assert ((expected * 255).round().astype("uint8") == found).all()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "inversion_dpo"},
        {"type": "inversion_dpo", "variant": "released"},
        {"type": "diffusion_dpo"},
    ],
    ids=lambda a: "-".join(a.values()),
)
def test_both_dpos_train(algorithm, scheduler, tmp_path):
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 4)
    states = 0 if algorithm["type"] == "diffusion_dpo" else 6
    config = tiny_pairs.settings(
        source,
        tmp_path,
        algorithm=algorithm,
        pairs={"inversion": {"steps": 6, "states": states}},
        training={"pairs_per_update": 4},
    )
    run = PreferenceTrainer(
        config, zero_model(scheduler), Accelerator(cpu=True), RunFolder(config.output_dir)
    )
    run.prepare()
    assert all(torch.isfinite(torch.tensor(run.train_update()["loss"])) for _ in range(2))
    assert ("states" in run.cache.batch(run.pairs, "cpu").__dict__) or states == 0


def test_diffusion_dpo_inverts_nothing_by_default(monkeypatch, tmp_path):
    from diffalign.config import load
    from diffalign.methods.preference import maker

    assert load("inversion-dpo", ["--algorithm.type=diffusion_dpo"]).states == 0
    assert load("inversion-dpo", []).states == 4

    def never(*_, **__):
        raise AssertionError("an inversion")

    monkeypatch.setattr(maker, "integrate", never)
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 2)
    config = tiny_pairs.settings(
        source,
        tmp_path,
        algorithm={"type": "diffusion_dpo"},
        pairs={"inversion": {"steps": 6}},
        training={"pairs_per_update": 2},
    )
    run = PreferenceTrainer(
        config, zero_model(), Accelerator(cpu=True), RunFolder(config.output_dir)
    )
    run.prepare()
    run.train_update()
