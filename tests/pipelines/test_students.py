"""Published few-step models by name: what they are made of, and what becomes of it in four bits."""

import json
from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from marks import slow_except

from diffalign import cli, lora
from diffalign.core.errors import UsageError
from diffalign.pipelines import published as layouts
from diffalign.pipelines import registry
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import MODELS, load_meta_model, load_model
from diffalign.pipelines.sampling import Sampling
from diffalign.quantization.accounting import report
from diffalign.quantization.layers import PackSpec
from diffalign.quantization.packed import pack_model
from diffalign.schedulers import Coefficients, QSched
from diffalign.schedulers.stock import scheduler_like

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
TURBO = EulerAncestralDiscreteScheduler(
    **SCALED_LINEAR, timestep_spacing="trailing", steps_offset=1
)
SCHNELL = FlowMatchEulerDiscreteScheduler(shift=1.0)
# name: tiny pipeline, its layout, its published scheduler; class and spacing of the student's; of the denoiser:
# parameters in billions, shares of linear layers and convolutions in per cent
PUBLISHED = {
    "flux.1-schnell": (
        *(tiny.flux_pipeline, "flux.1-schnell", SCHNELL),
        *("FlowMatchEulerDiscreteScheduler", None, 11.89, 99.97, 0),
    ),
    "sdxl-turbo": (
        *(tiny.sdxl_pipeline, "sdxl", TURBO),
        *("EulerAncestralDiscreteScheduler", "trailing", 2.567, 87.0, 13.0),
    ),
    "lcm-sd1.5": (
        *(tiny.sd_pipeline, "sd1.5", SD15),
        *("LCMScheduler", "leading", 0.8595, 31.4, 68.5),
    ),
    "pcm-sd1.5": (
        *(tiny.sd_pipeline, "sd1.5", SD15),
        *("TCDScheduler", "trailing", 0.8595, 31.4, 68.5),
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A pipeline as it is published, but for small text encoders and without a denoiser's weights."""

    def make(name):
        pipeline, layout, scheduler = PUBLISHED[name][:3]
        pipeline = pipeline()
        pipeline.register_modules(scheduler=scheduler)
        pipeline.save_pretrained(tmp_path)
        part = "transformer" if "flux" in layout else "unet"
        layouts.denoiser(layout).save_config(tmp_path / part)
        spec = replace(MODELS[name], source=str(tmp_path))
        monkeypatch.setitem(MODELS, name, spec)

    return make


@pytest.mark.parametrize("name", slow_except(["flux.1-schnell", "sdxl-turbo"], PUBLISHED))
def test_published_students_on_the_meta_device(name, folder):
    """Sizes and shares are those of the published configurations; four bits and their scales are 4.25 of 16."""
    folder(name)
    kind, spacing, billions, linear, convolutions = PUBLISHED[name][3:]
    model = load_meta_model(name)
    scheduler = QSched.wrap(model.pipeline.scheduler)  # its step is linear
    assert scheduler.stock is getattr(diffusers, kind)
    assert scheduler.config.get("timestep_spacing") == spacing
    assert scheduler.config.get("beta_end", 0.012) == 0.012  # the base's
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == 4

    assert model.denoiser.device.type == "meta"
    before = report(model.denoiser)
    assert before.weights / 1e9 == pytest.approx(billions, rel=2e-3)
    shares = {kind: 100 * tally.weights / before.weights for kind, tally in before.kinds.items()}
    assert shares["linear"] == pytest.approx(linear, abs=0.1)
    assert shares["conv"] == pytest.approx(convolutions, abs=0.1)
    pack_model(model.denoiser, spec=PackSpec(4))
    after = report(model.denoiser)
    assert after.ratio == pytest.approx(3.735, abs=0.01)
    pack_model(fresh := load_meta_model(name).denoiser, spec=PackSpec(4, svd_rank=32))
    assert 3.1 < report(fresh).ratio < after.ratio


@pytest.fixture
def student(tmp_path, monkeypatch):
    """A name for a base, a LoRA and a scheduler; and the folders of both."""
    base, adapter = tmp_path / "base", tmp_path / "lora"
    pipeline = tiny.sd_pipeline()
    pipeline.save_pretrained(base)
    lora.attach(pipeline.unet, rank=2, alpha=2, targets=["to_q", "to_v"])
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    lora.export_lora(pipeline.unet, pipeline, adapter)
    scheduler = "TCDScheduler,timestep_spacing=trailing"
    spec = registry.ModelSpec(str(base), "", lora=str(adapter), scheduler=scheduler)
    monkeypatch.setitem(MODELS, "tiny-student", spec)
    return base, adapter, scheduler


def test_a_named_student_is_what_merge_makes(student, tmp_path):
    base, adapter, scheduler = student
    flags = [f"--model={base}", f"--lora={adapter}", f"--scheduler={scheduler}", "--dtype=float32"]
    assert cli.main(["merge", *flags, f"--output_dir={tmp_path / 'merged'}"]) == 0
    expected = load_model(str(tmp_path / "merged"), dtype=torch.float32)
    found = load_model("tiny-student", dtype=torch.float32)
    settings = [QSched.wrap(m.pipeline.scheduler).settings for m in (found, expected)]
    assert settings[0] == settings[1]
    ours, theirs = found.denoiser.state_dict(), expected.denoiser.state_dict()
    assert ours.keys() == theirs.keys()  # no adapter is left
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    plain = load_model(str(base), dtype=torch.float32).denoiser.state_dict()
    assert any(not torch.equal(ours[k], plain[k]) for k in ours)


def test_a_named_student_is_quantised_in_one_command(student, tmp_path, capsys):
    flags = ["--model=tiny-student", "--backend=int8", "--dtype=float32", "--json"]
    assert cli.main(["quantize", *flags, f"--output_dir={tmp_path / 'small'}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["latency_ms"] > 0
    assert load_model(str(tmp_path / "small")).pipeline.scheduler.config.timestep_spacing == (
        "trailing"
    )


def test_a_named_student_cannot_be_quantised_while_it_loads(student):
    with pytest.raises(UsageError, match="tiny-student has a LoRA in its weights .* `diffalign me"):
        load_model("tiny-student", quantization_config=object())


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("asked", ["LCMScheduler", "TCDScheduler,timestep_spacing=trailing"])
def test_a_search_draws_what_the_stock_pipeline_draws(asked, tuned):
    """TCD's step has noise of its own accord, its pipeline has none."""
    model = tiny.sd_model()
    model.pipeline.register_modules(scheduler=scheduler_like(asked, SD15))
    if tuned:
        model.pipeline.scheduler = QSched.wrap(model.pipeline.scheduler)
        model.pipeline.scheduler.set_coefficients(Coefficients.ramp(0.9, 1.1, 4))
    expected = model.pipeline(
        "a circle",
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    batch = Sampling(model, model.encode_prompt(["a circle"]), Drawing(4))
    found = batch.draw(torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected)


def test_named_students_are_listed(capsys):
    assert cli.main(["list", "models"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in PUBLISHED)
