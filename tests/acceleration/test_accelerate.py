"""One call that accelerates, its report, its check, and the exact way back."""

import json
import logging
import os
import subprocess
import sys
from functools import partial

import pytest
import tiny
import torch

import diffalign
from diffalign import lora
from diffalign.acceleration.drawing import Call, draw
from diffalign.acceleration.rules import RULES, Situation, settle
from diffalign.acceleration.state import state_of
from diffalign.core.errors import UsageError
from diffalign.quantization import apply as quantization

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
STEPS = 12


@pytest.fixture(autouse=True)
def quantises_small_layers(monkeypatch):
    monkeypatch.setattr(
        quantization, "quantize_model", partial(quantization.quantize_model, min_weights=64)
    )


def arguments_of(name, **kwargs):
    return kwargs if name in tiny.UNETS else {"max_sequence_length": 16, **kwargs}


def options(name, model, **kwargs):
    """Options of a small acceleration; random models change too much for the usual floors."""
    return {
        "steps": STEPS,
        "sizes": (model.default_size,),
        "arguments": arguments_of(name),
        "prompts": ("a cat", "a dog"),
        "floor": 3.0,
        **kwargs,
    }


def a_call(name, model):
    return Call(STEPS, *model.default_size, ("a red circle", "a cat"), arguments_of(name), 5)


@pytest.mark.parametrize("preset", ["lossless", "balanced", "fast", "small"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_comes_back_to_the_pixel(name, preset):
    model, other = FAMILIES[name](), FAMILIES[name](seed=1)
    pipe, call = model.pipeline, a_call(name, model)
    plain, others = draw(pipe, call), draw(other.pipeline, call)
    before = state_of(pipe)
    assert diffalign.accelerate(pipe, preset, **options(name, model)) is pipe
    report = diffalign.acceleration(pipe)
    draw(pipe, call)
    assert torch.equal(draw(other.pipeline, call), others)
    assert report.check() == []
    assert all(d.why and d.remedy for d in report.dropped)
    assert {*report.applied, *(d.option for d in report.dropped)} >= set()
    assert "dropped" in json.dumps(report.to_json())
    assert preset in str(report)
    if preset in ("balanced", "fast"):
        assert "cache" in report.applied
    diffalign.restore(pipe)
    assert torch.equal(draw(pipe, call), plain)
    assert state_of(pipe) == before


def test_accelerate_twice_and_restore_twice(sd3):
    pipe = sd3.pipeline
    diffalign.accelerate(pipe, **options("sd3", sd3))
    with pytest.raises(UsageError, match="accelerated already"):
        diffalign.accelerate(pipe, **options("sd3", sd3))
    diffalign.restore(pipe)
    for call in (diffalign.restore, diffalign.acceleration):
        with pytest.raises(UsageError, match="not accelerated"):
            call(pipe)


def test_a_block_restores_at_its_end_and_after_an_error(sd3):
    call = a_call("sd3", sd3)
    plain = draw(sd3.pipeline, call)
    with diffalign.accelerated(sd3.pipeline, "fast", **options("sd3", sd3)) as fast:
        assert fast is sd3.pipeline
        assert not torch.equal(draw(fast, call), plain)
    assert torch.equal(draw(sd3.pipeline, call), plain)

    def fail():
        with diffalign.accelerated(sd3.pipeline, "fast", **options("sd3", sd3)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(draw(sd3.pipeline, call), plain)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"preset": "ballanced"}, "Did you mean 'balanced'"),
        ({"cach": 3}, "no such option"),
        ({"quantize": "int9"}, "quantize has no such choice"),
        ({"check": -1}, "positive"),
        ({"preset": "missing/acceleration.json"}, "neither a preset nor"),
        ({"steps": 4, "cache": "static"}, "too few"),
        ({"guidance": "interval", "arguments": {"guidance_scale": 1.0}}, "no second half"),
        ({"attention": "nativ"}, "no such attention backend"),
        ({"offload": "model"}, "not on a CUDA device"),
        ({"quantize": "torchao-fp8"}, "float8 needs"),
    ],
)
def test_bad_input_says_what_to_do(sd3, kwargs, words):
    before = state_of(sd3.pipeline)
    given = options("sd3", sd3) | kwargs
    with pytest.raises(UsageError, match=words):
        diffalign.accelerate(sd3.pipeline, given.pop("preset", "balanced"), **given)
    assert state_of(sd3.pipeline) == before


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(UsageError, match="no diffusers pipeline"):
        diffalign.accelerate(torch.nn.Linear(1, 1))


def test_an_option_of_the_preset_is_dropped_and_told(sd3):
    given = options("sd3", sd3) | {"steps": 4}
    diffalign.accelerate(sd3.pipeline, "balanced", **given)
    report = diffalign.acceleration(sd3.pipeline)
    assert "cache" not in report.applied
    assert "too few" in str(report)
    assert "deterministic" in str(report)


def test_below_the_floor_the_last_lossy_option_is_taken_back(sd3):
    given = options("sd3", sd3, floor=149.0, guidance="interval", cache=5)
    diffalign.accelerate(sd3.pipeline, "balanced", **given)
    report = diffalign.acceleration(sd3.pipeline)
    assert report.applied == {}
    assert [d.option for d in report.dropped if "floor" in d.why] == ["guidance", "cache"]
    assert report.measured["psnr"] > 149


def test_every_rule_has_reason_remedy_and_source():
    for rule in RULES:
        assert rule.remedy
        assert rule.source
    on = {"quantize": ("torchao-int8", False), "cache": (40.0, False)}
    kept, dropped = settle(on, Situation(cache_problem="no", has_lora=True))
    assert kept == {}
    assert {d.option for d in dropped} == {"quantize", "cache"}
    with pytest.raises(UsageError, match="What helps"):
        settle({"cache": (40.0, True)}, Situation(cache_problem="no"))


def test_a_plan_is_saved_and_put_in_force_by_load(tmp_path, sd3):
    pipe, call = sd3.pipeline, a_call("sd3", sd3)
    diffalign.accelerate(pipe, "fast", **options("sd3", sd3))
    fast = draw(pipe, call)
    pipe.save_pretrained(tmp_path)
    file = diffalign.acceleration(pipe).save(tmp_path)
    loaded = diffalign.load(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(loaded, call), fast, atol=1e-5)
    assert diffalign.acceleration(loaded).applied == diffalign.acceleration(pipe).applied
    other = tiny.sd3_pipeline(seed=1)
    with pytest.raises(UsageError, match="other weights"):
        diffalign.accelerate(other, file)
    with pytest.raises(UsageError, match="is for StableDiffusion3Pipeline"):
        diffalign.accelerate(tiny.flux_pipeline(), file)
    with pytest.raises(UsageError, match="its own options"):
        diffalign.accelerate(other, file, steps=3)
    file.write_text(file.read_text().replace('"format": 1', '"format": 99', 1))
    with pytest.raises(UsageError, match="format 99"):
        diffalign.accelerate(other, file)


def test_a_lora_loaded_before_and_after_is_in_force(sd3):
    pipe, call = sd3.pipeline, a_call("sd3", sd3)
    diffalign.accelerate(pipe, "balanced", **options("sd3", sd3))
    base = draw(pipe, call)
    add_lora(sd3)
    assert diffalign.acceleration(pipe).check() == []
    assert not torch.allclose(draw(pipe, call), base, atol=1e-3)
    with torch.no_grad():
        sd3.denoiser.proj_out.weight.zero_()
    with pytest.raises(UsageError, match="weights of transformer"):
        diffalign.restore(pipe)


def add_lora(model, scale=2.0):
    torch.manual_seed(0)
    lora.attach(model.denoiser, rank=2, alpha=4, targets=model.lora_targets, policies=())
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)


def zero(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


def poison(module):
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))


def swap(model, **config):
    scheduler = model.pipeline.scheduler
    model.pipeline.scheduler = type(scheduler).from_config(scheduler.config, **config)


def ignored_lora(model):
    add_lora(model, scale=0.0)


def wrong_weights(model):
    cache = model.pipeline.transformer._compiled_call_impl._tap.handler.handlers[0]
    weights = cache.schedules[0].weights
    for step, row in weights.items():
        weights[step] = tuple(
            type(w)((w.outputs[1], w.outputs[0] + 1), w.inputs, w.present) for w in row
        )


FAULTS = {
    "zeroed block": lambda m: zero(m.denoiser.transformer_blocks[0]),
    "zeroed last block": lambda m: zero(m.denoiser.transformer_blocks[-1]),
    "zeroed output": lambda m: zero(m.denoiser.proj_out),
    "zeroed attention": lambda m: zero(m.denoiser.transformer_blocks[0].attn.to_out[0]),
    "zeroed feed-forward": lambda m: zero(m.denoiser.transformer_blocks[0].ff),
    "zeroed embedding of the text": lambda m: zero(m.denoiser.context_embedder),
    "zeroed embedding of the time": lambda m: zero(m.denoiser.time_text_embed),
    "zeroed embedding of the image": lambda m: zero(m.denoiser.pos_embed),
    "NaN in the denoiser": lambda m: poison(m.denoiser),
    "NaN in the decoder": lambda m: poison(m.pipeline.vae.decoder),
    "NaN in a text encoder": lambda m: poison(m.pipeline.text_encoder_3),
    "zeroed decoder": lambda m: zero(m.pipeline.vae.decoder),
    "zeroed text encoder": lambda m: zero(m.pipeline.text_encoder_3),
    "scaled latents": lambda m: m.pipeline.vae.register_to_config(scaling_factor=0.2),
    "wrong shift": lambda m: swap(m, shift=9.0),
    "inverted schedule": lambda m: swap(m, use_karras_sigmas=True),
    "ignored LoRA": ignored_lora,
    "wrong weights of the cache": wrong_weights,
    "blocks in another order": lambda m: setattr(
        m.denoiser, "transformer_blocks", m.denoiser.transformer_blocks[1:]
    ),
    "other prompt encoder": lambda m: zero(m.pipeline.text_encoder),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_the_check_reports_planted_faults(sd3, fault):
    diffalign.accelerate(sd3.pipeline, "balanced", **options("sd3", sd3))
    report = diffalign.acceleration(sd3.pipeline)
    assert report.check() == []
    FAULTS[fault](sd3)
    assert report.check(), fault


def test_a_lora_without_effect_is_an_error_at_once(sd3):
    add_lora(sd3, scale=0.0)
    with pytest.raises(UsageError, match="has no effect"):
        diffalign.accelerate(sd3.pipeline, "balanced", **options("sd3", sd3))


@pytest.mark.parametrize("kind", ["interval", "reuse"])
@pytest.mark.parametrize("name", ["sd", "sd3", "sdxl", "sana"])
def test_guidance_computes_half_of_the_batch(name, kind):
    model = FAMILIES[name]()
    rows = []
    handle = model.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    given = options(name, model, guidance=kind, cache=False, check=0)
    diffalign.accelerate(model.pipeline, "lossless", **given)
    rows.clear()
    draw(model.pipeline, a_call(name, model))
    handle.remove()
    assert rows.count(2) == (5 if kind == "interval" else 6)
    assert rows.count(4) == (7 if kind == "interval" else 6)


def test_other_steps_warn_and_a_check_needs_images(sd3, caplog):
    diffalign.accelerate(sd3.pipeline, "balanced", **options("sd3", sd3, check=0))
    with pytest.raises(UsageError, match="check=0"):
        diffalign.acceleration(sd3.pipeline).check()
    with caplog.at_level(logging.WARNING):
        draw(sd3.pipeline, Call(10, 16, 16, ("a cat",), arguments_of("sd3")))
    assert "every step is computed" in caplog.text


def test_the_import_loads_no_torch():
    code = "import sys, diffalign.acceleration; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
