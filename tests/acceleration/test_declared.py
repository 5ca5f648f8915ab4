"""Numbers of images that blocks are compiled for: warm-up, warnings, plans and bad input."""

import logging
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler

import diffalign
from diffalign.acceleration.declared import Declared
from diffalign.acceleration.drawing import Call, draw
from diffalign.acceleration.report import Plan
from diffalign.core.errors import UsageError
from diffalign.pipelines import compiled

STEPS = 9


@pytest.fixture
def rows(sd3, monkeypatch):
    """Rows of each forward of the denoiser; nothing is compiled."""

    def as_they_are(parts):
        for part in parts:
            part._compiled_call_impl = part._call_impl

    monkeypatch.setattr(compiled, "compile_each", as_they_are)
    seen = []
    sd3.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return seen


def accelerate(model, *, guidance_scale=1.0, **options):
    given = {
        "steps": STEPS,
        "sizes": (model.default_size,),
        "arguments": {"max_sequence_length": 16, "guidance_scale": guidance_scale},
        "prompts": ("a cat",),
        "compile": "blocks",
        "floor": 3.0,
        "check": 2,
    }
    return diffalign.accelerate(model.pipeline, "lossless", **given | options)


def a_call(model, images, guidance_scale=1.0):
    arguments = {"max_sequence_length": 16, "guidance_scale": guidance_scale}
    return Call(STEPS, *model.default_size, ("a dog",) * images, arguments, 3)


def test_declared_numbers_are_drawn_before_the_first_call_and_others_warn(sd3, rows, caplog):
    plain = draw(sd3.pipeline, a_call(sd3, 4))
    rows.clear()
    accelerate(sd3, batch_sizes=(1, 3), sizes=(sd3.default_size, (16, 32)))
    assert set(rows) == {1, 2, 3}
    with caplog.at_level(logging.WARNING):
        for images in (1, 2, 3):
            draw(sd3.pipeline, a_call(sd3, images))
        assert "batch_sizes" not in caplog.text
        for _ in range(2):
            assert torch.equal(draw(sd3.pipeline, a_call(sd3, 4)), plain)
    assert caplog.text.count("4 images at a time are none of the declared numbers (1, 3)") == 1
    diffalign.restore(sd3.pipeline)


@pytest.mark.parametrize("guidance", [False, "interval", "reuse"])
def test_guidance_is_no_second_image(sd3, rows, caplog, guidance):
    accelerate(sd3, guidance_scale=4.0, guidance=guidance, cache=20, batch_sizes=(2,))
    with caplog.at_level(logging.WARNING):
        draw(sd3.pipeline, a_call(sd3, 2, guidance_scale=4.0))
        assert "batch_sizes" not in caplog.text
        draw(sd3.pipeline, a_call(sd3, 3, guidance_scale=4.0))
    assert caplog.text.count("3 images at a time are none") == 1


def test_a_plan_keeps_its_numbers_and_draws_nothing(sd3, rows, tmp_path, caplog):
    accelerate(sd3, batch_sizes=(2,), sizes=(sd3.default_size, (16, 32)))
    file = diffalign.acceleration(sd3.pipeline).save(tmp_path)
    diffalign.restore(sd3.pipeline)
    rows.clear()
    diffalign.accelerate(sd3.pipeline, tmp_path)
    assert rows == []
    plan = diffalign.acceleration(sd3.pipeline).plan
    assert (plan.batch_sizes, plan.sizes) == ((2,), (sd3.default_size, (16, 32)))
    with caplog.at_level(logging.WARNING):
        draw(sd3.pipeline, a_call(sd3, 2))
        assert "batch_sizes" not in caplog.text
        draw(sd3.pipeline, a_call(sd3, 1))
    assert "1 images at a time are none" in caplog.text
    file.write_text(file.read_text().replace('"batch_sizes"', '"lora_rank"', 1), encoding="utf-8")
    assert Plan.load(file).batch_sizes == (1,)


def test_a_number_of_the_check_counts_for_the_size_that_was_checked():
    declared = Declared(((16, 16), (32, 16)), (1,))
    declared._read_latents((16, 16), 2)
    assert declared.holds
    declared.close()
    compiled = {((16, 16), 2), ((16, 16), 1), ((32, 16), 1)}
    for size in ((16, 16), (32, 16), (32, 32)):
        for images in (1, 2, 3):
            declared._read_latents(size, images)
            assert declared.holds == ((size, images) in compiled)


def test_a_plan_of_before_a_shift_computes_every_step(sd3, tmp_path, caplog):
    """The shift that `set_shift` sets is in no configuration."""
    file = saved(sd3, tmp_path)
    sd3.pipeline.scheduler.set_shift(9.0)
    plain = draw(sd3.pipeline, a_call(sd3, 1))
    diffalign.accelerate(sd3.pipeline, file)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(draw(sd3.pipeline, a_call(sd3, 1)), plain)
    assert "not those of the calibration" in caplog.text


def saved(model, folder, **options):
    accelerate(model, compile=False, cache=20, check=0, **options)
    file = diffalign.acceleration(model.pipeline).save(folder)
    diffalign.restore(model.pipeline)
    return file


def test_a_plan_of_another_scheduler_is_refused(sd3, tmp_path):
    file, scheduler = saved(sd3, tmp_path), sd3.pipeline.scheduler
    sd3.pipeline.scheduler = type(scheduler).from_config(scheduler.config, shift=9.0)
    with pytest.raises(UsageError, match="other settings of FlowMatchEulerDiscreteScheduler"):
        diffalign.accelerate(sd3.pipeline, file)
    sd3.pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(UsageError, match="the plan is for FlowMatchEuler"):
        diffalign.accelerate(sd3.pipeline, file)
    sd3.pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    diffalign.accelerate(sd3.pipeline, file)


def test_a_plan_of_another_device_or_version_warns_and_rules_hold(sd3, tmp_path, caplog):
    plan = Plan.load(saved(sd3, tmp_path))
    for changes in ({"device": "cuda"}, {"versions": {**plan.versions, "torch": "1.0"}}):
        caplog.clear()
        diffalign.accelerate(sd3.pipeline, replace(plan, **changes))
        assert "its figures may not hold" in caplog.text
        diffalign.restore(sd3.pipeline)
    caplog.clear()
    diffalign.accelerate(sd3.pipeline, plan)
    assert caplog.text == ""
    diffalign.restore(sd3.pipeline)
    for options in ({"offload": "model"}, {"quantize": "torchao-fp8", "compile": "blocks"}):
        with pytest.raises(UsageError, match="What helps"):
            diffalign.accelerate(sd3.pipeline, replace(plan, options=options))


def test_without_a_check_nothing_is_drawn(sd3, rows):
    accelerate(sd3, check=0, batch_sizes=(1, 4))
    assert rows == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_sizes": ()}, "no number of images"),
        ({"batch_sizes": (0,)}, r"batch_sizes=\(0,\): these are no positive integers"),
        ({"batch_sizes": (1.5,)}, "no positive integers"),
        ({"batch_sizes": 4}, "no positive integers"),
        ({"sizes": (64,)}, r"sizes=\(64,\): these are no positive integers"),
        ({"sizes": ((64, 0),)}, "no positive integers"),
        ({"sizes": ((64, 64, 64),)}, "no positive integers"),
    ],
)
def test_wrong_numbers_are_refused(options, words):
    with pytest.raises(UsageError, match=words) as error:
        accelerate(tiny.sd3_model(), **options)
    assert "Pass" in str(error.value)
