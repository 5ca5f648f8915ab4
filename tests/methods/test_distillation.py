"""Few-step students: what they are asked, and the loop that asks them."""

import json

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from tiny_students import MODELS, settings, trainer

from diffalign import cli, lora
from diffalign.algorithms import distillation as losses
from diffalign.config import ConfigError, DistillationRunConfig, load
from diffalign.core.errors import UsageError
from diffalign.data.prompts import load_prompts
from diffalign.diffusion.paths import RectifiedFlow, VariancePreserving
from diffalign.methods.distillation.trainer import student_scheduler
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.flux import fold_guidance
from diffalign.pipelines.registry import load_meta_model
from diffalign.pipelines.sampler import Sampler
from diffalign.training.memory import forecast
from diffalign.training.plan import make_plan
from diffalign.training.sums import Sums

PATHS = {
    "flow": RectifiedFlow(),
    "epsilon": VariancePreserving(DDIMScheduler().alphas_cumprod, "epsilon"),
    "v": VariancePreserving(DDIMScheduler().alphas_cumprod, "v_prediction"),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def states():
    return torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


# --- closed forms


@each_path
def test_one_euler_step_along_a_chord_lands_on_its_end(path):
    start, end = states()
    start_at, end_at = torch.tensor([999.0, 700.0, 400.0]), torch.tensor([700.0, 350.0, 0.0])
    for share in (0.0, 0.4):
        found = losses.chords(path, start, end, start_at, end_at, torch.full((3,), share))
        here, there = path.ode_time(found.timesteps), path.ode_time(end_at)
        state = path.to_ode(found.noisy_latents, found.timesteps)
        state = state + (there - here).view(-1, 1, 1, 1) * found.slope
        torch.testing.assert_close(path.from_ode(state, end_at), end, rtol=1e-4, atol=1e-4)
        if share == 0:
            torch.testing.assert_close(found.noisy_latents, start, rtol=1e-4, atol=1e-5)
            assert torch.equal(found.timesteps, start_at)


def test_of_a_flow_the_chord_is_a_straight_line():
    start, end = states()
    found = losses.chords(
        PATHS["flow"],
        start,
        end,
        torch.full((3,), 800.0),
        torch.full((3,), 300.0),
        torch.full((3,), 0.2),
    )
    torch.testing.assert_close(found.noisy_latents, 0.8 * start + 0.2 * end)
    torch.testing.assert_close(found.slope, (end - start) / -0.5)
    assert found.timesteps.tolist() == [700.0] * 3


@each_path
def test_a_student_that_knows_the_slope_has_no_loss(path):
    start, end = states()
    times = torch.tensor([600.0, 500.0, 400.0]), torch.tensor([400.0, 350.0, 100.0])
    found = losses.chords(path, start, end, *times, torch.tensor([0.0, 0.3, 0.9]))
    pred = found.slope
    if path is PATHS["v"]:  # the prediction whose implied noise is the slope
        a, s = (x.view(-1, 1, 1, 1) for x in path.scales(found.timesteps))
        pred = (found.slope - s * found.noisy_latents) / a
    assert losses.reflow_loss(path, pred, found).max() < 1e-6
    assert losses.reflow_loss(path, pred + 0.1, found).min() > 1e-4


@each_path
def test_consistency_is_the_identity_at_the_clean_end(path):
    x, m = states()
    found = losses.consistency_output(path, m, x, torch.zeros(3))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_consistency_is_what_diffusers_lcm_scheduler_takes_it_for(prediction):
    scheduler = LCMScheduler(prediction_type=prediction)
    scheduler.set_timesteps(4)
    path = VariancePreserving(scheduler.alphas_cumprod, prediction)
    x, m = states()
    for t in scheduler.timesteps:
        _, denoised = scheduler.step(m, t, x, return_dict=False)
        here = losses.consistency_output(path, m, x, t.expand(3))
        torch.testing.assert_close(here, denoised, rtol=1e-4, atol=1e-4)


def test_pseudo_huber_is_square_near_zero_and_absolute_far_away():
    zero = torch.zeros(1, 4)
    assert losses.pseudo_huber(zero + 1e-2, zero, c=0.1).item() == pytest.approx(
        1e-4 / 0.2, rel=1e-2
    )
    assert losses.pseudo_huber(zero + 50, zero, c=0.1).item() == pytest.approx(49.9, rel=1e-4)


def test_subdivide_keeps_the_coarse_grid():
    coarse = torch.tensor([1000.0, 600.0, 0.0])
    fine = losses.subdivide(coarse, 4)
    assert fine.tolist() == [1000, 900, 800, 700, 600, 450, 300, 150, 0]
    assert torch.equal(losses.subdivide(coarse, 1), coarse)


# --- schedulers of students


def test_students_get_schedulers_that_begin_at_noise():
    flow, unet = tiny.flux_model(), tiny.sd_model()
    assert student_scheduler(flow, "reflow") is flow.pipeline.scheduler
    assert isinstance(student_scheduler(flow, "consistency"), FlowMatchLCMScheduler)
    assert isinstance(student_scheduler(unet, "consistency"), LCMScheduler)
    found = student_scheduler(unet, "reflow")
    assert isinstance(found, DDIMScheduler)
    found.set_timesteps(4)
    assert found.timesteps.tolist() == [999, 749, 499, 249]


def test_images_of_stochastic_schedulers_are_a_matter_of_their_seeds():
    model = tiny.flux_model()
    model.pipeline.scheduler = student_scheduler(model, "consistency")
    sampler = Sampler(model, Drawing(num_inference_steps=3, mixed_precision="no"))

    def draw(prompts, seeds):
        return sampler.images(prompts, seeds).latents

    both = draw(["a", "b"], [5, 6])
    torch.manual_seed(99)
    torch.testing.assert_close(draw(["b"], [6])[0], both[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(draw(["b"], [7])[0], both[1], atol=1e-2)


# --- the loop


METHODS = {
    "reflow": {},
    "consistency": {"type": "consistency"},
    "lcm": {"type": "consistency", "skip": 2},
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_updates_bring_the_student_nearer(family, method, tmp_path, monkeypatch):
    """On trajectories seen again and again the error falls; only the adapter learns."""
    found = trainer(tmp_path, family, algorithm=METHODS[method], optimizer={"learning_rate": 0.003})
    base = {k: v.clone() for k, v in found.model.denoiser.state_dict().items() if "lora" not in k}
    c = found.config
    plan = make_plan(found.prompts, c.teacher, seed=0, update=99, tasks=c.prompts)
    monkeypatch.setattr("diffalign.methods.distillation.trainer.make_plan", lambda *a, **k: plan)
    with torch.no_grad():
        drawn = found.draw(plan)
        before = found.losses(
            drawn, Sums(["loss", "relative_error"], torch.device("cpu")), update=99
        )
        for _ in range(10):
            with torch.enable_grad():
                row = found.train_update()
        after = found.losses(
            drawn, Sums(["loss", "relative_error"], torch.device("cpu")), update=99
        )
    assert after.mean() < before.mean()
    assert row["update"] == 10
    for name, value in base.items():
        assert torch.equal(found.model.denoiser.state_dict()[name], value)


def test_trajectories_are_the_teachers_and_end_where_it_ends(tmp_path):
    """The reference's own Euler steps on the fine grid: what the stock pipeline draws with as many steps."""
    found = trainer(tmp_path, "sd3", evaluation={"num_inference_steps": 8})
    assert len(found.grid) == len(found.coarse) == 9
    c = found.config
    plan = make_plan(found.prompts, c.teacher, seed=0, update=1, tasks=c.prompts)
    drawn = found.draw(plan)
    assert drawn.states.shape[:2] == (9, 4)
    sampler = Sampler(tiny.sd3_model(), Drawing(num_inference_steps=8, mixed_precision="no"))
    texts = [plan.prompts[i].text for i in plan.prompt_index.tolist()]
    expected = sampler.images(texts, plan.seeds).latents
    torch.testing.assert_close(drawn.states[-1], expected, rtol=1e-3, atol=1e-3)


def test_guidance_is_distilled_away(tmp_path):
    found = trainer(tmp_path, "sd", teacher={"guidance_scale": 4.0})
    plain = trainer(tmp_path, "sd")
    plan = make_plan(
        found.prompts, found.config.teacher, seed=0, update=1, tasks=found.config.prompts
    )
    assert not torch.allclose(found.draw(plan).states[-1], plain.draw(plan).states[-1], atol=1e-3)
    assert found.evaluation(lora.REFERENCE).guidance_scale == 4.0
    assert found.evaluation(lora.CURRENT).guidance_scale is None
    with pytest.raises(UsageError, match=r"evaluation\.guidance_scale: a student of"):
        trainer(tmp_path, "sd", evaluation={"guidance_scale": 4.0})


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    grads = []
    for size in (1, 4):
        found = trainer(
            tmp_path, training={"micro_batch_size": size}, teacher={"micro_batch_size": size}
        )
        row = found.train_update()
        grads.append((row["grad_norm"], row["loss"]))
    assert grads[0] == pytest.approx(grads[1], rel=1e-3)


def test_states_are_spread_over_the_windows(tmp_path):
    found = trainer(tmp_path, algorithm={"window_starts": 1.0})
    chosen, share, coin = found.choices(range(6), 2, update=1)
    assert sorted(chosen[:4].tolist()) == [0, 0, 1, 1]
    assert ((share >= 0) & (share < 1) & (coin < 1)).all()
    again, *_ = found.choices(range(6), 2, update=1)
    assert torch.equal(chosen, again)


def test_the_student_draws_with_its_scheduler_and_the_teacher_with_its_own(tmp_path):
    found = trainer(tmp_path, "sd", algorithm={"type": "consistency"})
    own = found.model.pipeline.scheduler
    with found.drawing(lora.AVERAGED):
        assert isinstance(found.model.pipeline.scheduler, LCMScheduler)
    with found.drawing(lora.REFERENCE):
        assert found.model.pipeline.scheduler is own
    assert found.model.pipeline.scheduler is own
    assert found.evaluation(lora.REFERENCE).num_inference_steps == 8


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_consistency_targets_are_the_averaged_policys_and_end_at_the_teachers(
    family, tmp_path, monkeypatch
):
    run = trainer(tmp_path, family, algorithm={"type": "consistency", "skip": 2})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.model.denoiser.named_parameters():
            if f".{lora.CURRENT}." in name or f".{lora.AVERAGED}." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    targets = []
    monkeypatch.setattr(
        "diffalign.methods.distillation.consistency.pseudo_huber",
        lambda found, target, c: targets.append(target) or target.sum((1, 2, 3)),
    )
    c = run.config
    plan = make_plan(run.prompts, c.teacher, seed=0, update=1, tasks=c.prompts)
    with torch.no_grad():
        drawn = run.draw(plan)
        run.losses(drawn, Sums(["loss", "relative_error"], torch.device("cpu")), update=1)
    last, count = len(run.grid) - 1, c.algorithm.states_per_image
    chosen, _, _ = run.choices(drawn.image, last, 1)
    later = (chosen + 2).clamp(max=last)
    rows = torch.arange(len(drawn.image)).repeat_interleave(count)
    states = drawn.states[later, rows]
    with torch.no_grad(), lora.policy(run.model.denoiser, lora.AVERAGED):
        guess = run._clean(states, run.grid[later], drawn.embeds[rows])
    ended = later == last
    assert ended.any()
    assert not ended.all()
    torch.testing.assert_close(targets[0][~ended], guess[~ended])
    assert torch.equal(targets[0][ended], drawn.states[-1, rows[ended]])
    with torch.no_grad():
        current = run._clean(states, run.grid[later], drawn.embeds[rows])
    assert not torch.allclose(guess[~ended], current[~ended], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_in_which_prompts_return_is_bit_identical(method, tmp_path, monkeypatch):
    tiny.make_embeddings_depend_on_their_batch(monkeypatch)

    def build(name):
        prompts = load_prompts("shapes:train")[:4]
        teacher = {"prompts_per_update": 3, "num_inference_steps": 4}
        algorithm = METHODS[method]
        return trainer(tmp_path / name, train=prompts, teacher=teacher, algorithm=algorithm)

    whole = build("whole")
    for _ in range(4):
        whole.train_update()
    first = build("parts")
    for _ in range(2):
        first.train_update()
    first.save()
    second = build("parts")
    assert second.resume()
    for _ in range(2):
        second.train_update()
    for policy in (lora.CURRENT, lora.AVERAGED):
        a, b = (lora.adapter_state(r.model.denoiser, policy) for r in (whole, second))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["reflow", "consistency"])
def test_a_run_from_the_command_line_resumes_and_leaves_a_student(method, tmp_path):
    """Train, interrupted and resumed; then merged into a folder that stock diffusers draws with."""
    tiny.flux_pipeline().save_pretrained(tmp_path / "base")
    common = [
        *("train", "distill-shapes-flux", f"--model.name={tmp_path / 'base'}"),
        *(f"--algorithm.type={method}", "--algorithm.states_per_image=2", "--model.compile=false"),
        *("--rewards={jpeg: 1.0}", "--lora.rank=2", "--lora.targets=attn.to_q,attn.to_k"),
        *("--teacher.prompts_per_update=3", "--teacher.num_inference_steps=4"),
        *("--evaluation.images_per_task=1", "--evaluation.num_inference_steps=2"),
        *("--mixed_precision=no", "--model.dtype=float32", "--resolution=16"),
        *("--optimizer.lr_scheduler=constant", "--training.checkpoint_every=2"),
        *("--training.sample_every=2", "--training.eval_every=2"),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*common, "--max_train_steps=4", f"--output_dir={whole}"]) == 0
    assert cli.main([*common, "--max_train_steps=2", f"--output_dir={parts}"]) == 0
    assert cli.main([*common, "--max_train_steps=4", f"--output_dir={parts}"]) == 0
    rows = [
        [json.loads(line)["loss"] for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (whole, parts)
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["teacher_steps"] == 4
    assert "trajectories of the teacher" in (whole / "report.html").read_text()
    student = tmp_path / "student"
    merge = ["merge", f"--model={tmp_path / 'base'}", f"--lora={whole / 'lora'}"]
    merge += [f"--scheduler={whole / 'scheduler'}", "--fold_guidance=3.5", "--dtype=float32"]
    assert cli.main([*merge, f"--output_dir={student}"]) == 0
    pipe = DiffusionPipeline.from_pretrained(student)
    kind = FlowMatchEulerDiscreteScheduler if method == "reflow" else FlowMatchLCMScheduler
    assert type(pipe.scheduler) is kind
    assert not pipe.transformer.config.guidance_embeds
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)


def test_merge_says_what_it_cannot_do(tmp_path, capsys):
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    model = tiny.sd_model()
    lora.attach(model.denoiser, rank=2, alpha=2, targets=["to_q"])
    lora.export_lora(model.denoiser, model.pipeline, tmp_path / "lora")
    merge = ["merge", f"--model={tmp_path / 'base'}", f"--lora={tmp_path / 'lora'}"]
    merge += [f"--output_dir={tmp_path / 'out'}"]
    assert cli.main([*merge, "--fold_guidance=3"]) == 2
    assert "--fold_guidance: is for FLUX" in capsys.readouterr().err
    assert cli.main([*merge, f"--scheduler={tmp_path / 'nowhere'}"]) == 2
    assert "holds no scheduler" in capsys.readouterr().err
    assert cli.main([*merge, "--scheduler=MagicScheduler"]) == 2
    assert "--scheduler=MagicScheduler: diffusers has no such class" in capsys.readouterr().err
    assert cli.main([*merge, "--scheduler=TCDScheduler,spacing=trailing"]) == 2
    assert "TCDScheduler has no spacing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_published_students_lora_and_scheduler_make_a_pipeline(tmp_path):
    """As LCM and PCM are published: a LoRA in a subfolder of a repository, and a scheduler's class."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    model = tiny.sd_model()
    parameters = lora.attach(model.denoiser, rank=2, alpha=2, targets=["to_q"])
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.data.normal_()
    lora.export_lora(model.denoiser, model.pipeline, tmp_path / "published" / "sd15")
    file = next((tmp_path / "published" / "sd15").glob("*.safetensors"))
    file.rename(file.with_name("pcm_4step.safetensors"))
    merge = ["merge", f"--model={tmp_path / 'base'}", f"--output_dir={tmp_path / 'student'}"]
    merge += [f"--lora={tmp_path / 'published'}:sd15/pcm_4step.safetensors"]
    asked = "TCDScheduler,timestep_spacing=trailing,set_alpha_to_one=false"
    assert cli.main([*merge, f"--scheduler={asked}", "--dtype=float32"]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "student")
    base = DiffusionPipeline.from_pretrained(tmp_path / "base")
    assert type(pipe.scheduler) is TCDScheduler
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.scheduler.config.set_alpha_to_one is False
    assert pipe.scheduler.config.beta_end == base.scheduler.config.beta_end
    here, there = pipe.unet.state_dict(), base.unet.state_dict()
    changed = {k for k in here if not torch.equal(here[k], there[k])}
    assert changed
    assert all(k.endswith("to_q.weight") for k in changed)


def test_folded_guidance_is_the_same_function():
    model = tiny.flux_model()
    plain = tiny.flux_model()
    plain.pipeline.transformer = fold_guidance(plain.denoiser, 2.5)
    x = torch.randn(2, *model.latent_shape((16, 16)))
    t = torch.tensor([900.0, 200.0])
    embeds = model.encode_prompt(["a red square", "a ring"])
    with torch.no_grad():
        expected = model.predict(x, t, embeds, guidance_scale=2.5)
        assert torch.allclose(plain.predict(x, t, embeds), expected, atol=1e-5)
        assert not torch.allclose(
            model.predict(x, t, embeds, guidance_scale=5.0), expected, atol=1e-4
        )
    with pytest.raises(UsageError, match="no guidance embedding to fold"):
        fold_guidance(plain.denoiser, 2.5)


# --- configuration


def test_diffusers_names_of_its_distillation_scripts():
    config = load(
        "distill-shapes-flux",
        ["--num_ddim_timesteps=32", "--algorithm.type=consistency", "--huber_c=0.01"],
    )
    assert isinstance(config, DistillationRunConfig)
    assert config.teacher.num_inference_steps == 32
    assert config.algorithm.huber_c == 0.01


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("teacher", {"num_inference_steps": 1}, "at least the student's steps"),
        ("teacher", {"solver": "rk4"}, r"teacher\.solver"),
        ("teacher", {"prompts_per_update": 0}, r"teacher\.prompts_per_update"),
        ("algorithm", {"states_per_image": 0}, r"algorithm\.states_per_image"),
        ("algorithm", {"window_starts": 2}, r"algorithm\.window_starts"),
        ("algorithm", {"type": "consistency", "skip": 0}, r"algorithm\.skip"),
        ("algorithm", {"type": "consistency", "huber_c": 0}, r"algorithm\.huber_c"),
        ("evaluation", {"solver": "adams_bashforth"}, r"evaluation\.solver"),
    ],
)
def test_settings_that_cannot_be_run(group, values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **{group: values})


def test_memory_forecast_counts_states_of_a_micro_batch(tmp_path):
    tiny.flux_pipeline().save_pretrained(tmp_path / "base")
    found = []
    for count in (1, 4):
        model = load_meta_model(str(tmp_path / "base"), max_sequence_length=16)
        config = settings(
            tmp_path,
            algorithm={"states_per_image": count},
            teacher={"height": tiny.SIZE, "width": tiny.SIZE},
        )
        found.append(forecast(model, config).activations)
    assert found[1] == pytest.approx(4 * found[0], rel=0.05)
