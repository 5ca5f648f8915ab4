"""LoRAs on an accelerated pipeline: in force, swapped without compiling again, or refused with what to do."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from compilation import counted
from marks import slow_except

import diffalign
from diffalign import lora
from diffalign.acceleration.adapters import HOTSWAP, names_of, why_silent
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.state import state_of
from diffalign.core.errors import UsageError
from diffalign.quantization import apply as quantization

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
STEPS = 2


@pytest.fixture(autouse=True)
def quantises_small_layers(monkeypatch):
    monkeypatch.setattr(
        quantization, "quantize_model", partial(quantization.quantize_model, min_weights=64)
    )


@pytest.fixture
def counter(monkeypatch):
    with counted(monkeypatch, "eager") as counter:
        yield counter


def a_call(name, model):
    length = {} if name in tiny.UNETS else {"max_sequence_length": 16}
    return Call(STEPS, *model.default_size, ("a cat",), length)


def a_lora(folder, name, *, rank, seed, scale=0.5, targets=None):
    """Return the folder of a LoRA that changes a tiny model's images."""
    model = FAMILIES[name]()
    torch.manual_seed(seed)
    options = {"rank": rank, "alpha": rank + seed, "policies": ()}
    lora.attach(model.denoiser, targets=targets or model.lora_targets, **options)
    with torch.no_grad():
        for key, parameter in model.denoiser.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, scale)
    lora.export_lora(model.denoiser, model.pipeline, folder)
    return str(folder)


def accelerate(name, model, **options):
    call = a_call(name, model)
    given = {"steps": STEPS, "sizes": (model.default_size,), "check": 0}
    given["arguments"] = call.arguments
    diffalign.accelerate(model.pipeline, "lossless", **given | options)
    return model.pipeline


@pytest.mark.parametrize(
    "name",
    slow_except(["sd3"], ["sd3", "flux", "sana", "sd", "sdxl"]),
)
def test_loras_are_swapped_without_compiling_again(tmp_path, name, counter):
    first = a_lora(tmp_path / "first", name, rank=2, seed=0)
    second = a_lora(tmp_path / "second", name, rank=4, seed=1)
    model, stock = FAMILIES[name](), FAMILIES[name]().pipeline
    call = a_call(name, model)
    pipe = accelerate(name, model, compile="blocks", lora_rank=8)
    draw(pipe, call)
    assert counter.frame_count > 0
    pipe.load_lora_weights(first, adapter_name="style")
    of_first = draw(pipe, call)
    compilations = counter.frame_count
    pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
    of_second = draw(pipe, call)
    assert counter.frame_count == compilations
    for folder, images in ((first, of_first), (second, of_second)):
        stock.load_lora_weights(folder, adapter_name="style")
        assert min(psnr(draw(stock, call), images)) > 60
        stock.unload_lora_weights()
    assert max(psnr(of_first, of_second)) < 60


def test_a_lora_beside_another_and_one_without_a_rank_are_told(tmp_path, counter, caplog):
    first = a_lora(tmp_path / "first", "sd3", rank=2, seed=0)
    for rank, words in ((None, "lora_rank=RANK"), (4, "hotswap=True")):
        pipe = accelerate("sd3", tiny.sd3_model(), compile="blocks", lora_rank=rank)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pipe.load_lora_weights(first, adapter_name="one")
        assert ("RANK" in caplog.text) == (rank is None)
        with caplog.at_level(logging.WARNING):
            pipe.load_lora_weights(first, adapter_name="two")
        assert words in caplog.text


def test_a_lora_of_a_larger_rank_is_refused_with_the_order_that_works(tmp_path):
    folder = a_lora(tmp_path, "sd3", rank=4, seed=0)
    pipe = accelerate("sd3", tiny.sd3_model(), lora_rank=2)
    with pytest.raises(
        UsageError, match=r"lora_rank=2: the LoRA .*`accelerate` with a `lora_rank`"
    ):
        pipe.load_lora_weights(folder)
    assert names_of(pipe.transformer) == set()
    diffalign.restore(pipe)
    assert "load_lora_weights" not in vars(pipe)
    assert HOTSWAP not in vars(pipe.transformer)


def test_a_prepared_pipeline_is_prepared_again_after_an_unloading(tmp_path):
    first = a_lora(tmp_path / "first", "sd3", rank=2, seed=0)
    pipe = accelerate("sd3", tiny.sd3_model(), lora_rank=8)
    for _ in range(2):
        pipe.load_lora_weights(first, adapter_name="style")
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        assert layer.lora_A["style"].weight.shape[0] == 8
        pipe.unload_lora_weights()
    diffalign.restore(pipe)


def test_a_rank_is_for_pipelines_without_a_lora(tmp_path):
    model = tiny.sd3_model()
    before = state_of(model.pipeline)
    with pytest.raises(UsageError, match="lora_rank=0: this is no rank"):
        accelerate("sd3", model, lora_rank=0)
    assert state_of(model.pipeline) == before
    model.pipeline.load_lora_weights(a_lora(tmp_path, "sd3", rank=2, seed=0))
    with pytest.raises(UsageError, match="carries the LoRA default_0 already"):
        accelerate("sd3", model, lora_rank=4)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_lora_on_quantised_weights_is_in_force_and_not_fused(tmp_path, quantize):
    folder = a_lora(tmp_path, "sd3", rank=2, seed=0)
    model = tiny.sd3_model()
    call = a_call("sd3", model)
    pipe = accelerate("sd3", model, quantize=quantize)
    base = draw(pipe, call)
    pipe.load_lora_weights(folder)
    loaded = draw(pipe, call)
    assert max(psnr(base, loaded)) < 40
    with pytest.raises(UsageError, match="Leave the LoRA as an adapter"):
        pipe.fuse_lora()
    assert torch.equal(draw(pipe, call), loaded)


def test_a_lora_on_plain_weights_is_fused(tmp_path):
    pipe = accelerate("sd3", tiny.sd3_model(), attention="native")
    pipe.load_lora_weights(a_lora(tmp_path, "sd3", rank=2, seed=0))
    call = a_call("sd3", tiny.sd3_model())
    loaded = draw(pipe, call)
    pipe.fuse_lora()
    assert min(psnr(draw(pipe, call), loaded)) > 80


@pytest.mark.parametrize("name", ["sd3", "flux", "sd"])
def test_a_lora_that_fused_projections_ignore_is_an_error(tmp_path, name):
    model = FAMILIES[name]()
    folder = a_lora(tmp_path, name, rank=2, seed=0, targets=["to_q", "to_k", "to_v"])
    call = a_call(name, model)
    model.denoiser.fuse_qkv_projections()
    pipe = accelerate(name, model)
    base = draw(pipe, call)
    with pytest.raises(UsageError, match="has no effect.*fused.*unfuse_qkv_projections"):
        pipe.load_lora_weights(folder)
    assert names_of(model.denoiser) == set()
    assert torch.equal(draw(pipe, call), base)
    diffalign.restore(pipe)
    # stock diffusers says nothing
    pipe.load_lora_weights(folder)
    assert torch.equal(draw(pipe, call), base) or name == "sd"
    with pytest.raises(UsageError, match="has no effect"):
        accelerate(name, model)


def test_a_lora_of_zeros_and_one_of_another_model_are_errors(tmp_path):
    pipe = accelerate("sd3", tiny.sd3_model())
    zeros = a_lora(tmp_path / "zeros", "sd3", rank=2, seed=0, scale=0.0)
    with pytest.raises(UsageError, match="has no effect: its .* layers add zero"):
        pipe.load_lora_weights(zeros)
    other = a_lora(tmp_path / "other", "sd", rank=2, seed=0)
    with pytest.raises(UsageError, match="no layer of this StableDiffusion3Pipeline"):
        pipe.load_lora_weights(other)
    assert names_of(pipe.transformer) == set()


def test_a_lora_of_some_ignored_layers_says_how_many(tmp_path):
    model = tiny.sd3_model()
    targets = [*model.lora_targets, "proj_out"]
    model.pipeline.load_lora_weights(a_lora(Path(tmp_path), "sd3", rank=2, seed=0, targets=targets))
    assert why_silent(model.denoiser, "default_0") is None
    model.denoiser.transformer_blocks[0].attn.fuse_projections()
    assert " of " in why_silent(model.denoiser, "default_0")
    assert why_silent(model.denoiser, "unknown") is None


def test_a_plan_keeps_the_rank(tmp_path):
    pipe = accelerate("sd3", tiny.sd3_model(), lora_rank=4)
    file = diffalign.acceleration(pipe).save(tmp_path)
    diffalign.restore(pipe)
    diffalign.accelerate(pipe, file)
    assert diffalign.acceleration(pipe).plan.lora_rank == 4
    assert vars(pipe.transformer)[HOTSWAP]["target_rank"] == 4


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_a_lora_for_guidance_halves_every_batch_and_is_gone_afterwards(tmp_path, name):
    folder = a_lora(tmp_path, name, rank=2, seed=0)
    model, stock = FAMILIES[name](), FAMILIES[name]().pipeline
    call, before = a_call(name, model), state_of(model.pipeline)
    plain = draw(model.pipeline, call)
    rows = []
    handle = model.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    before = state_of(model.pipeline)
    pipe = accelerate(name, model, guidance=folder)
    rows.clear()
    fast = draw(pipe, call)
    assert rows == [1] * STEPS
    stock.load_lora_weights(folder)
    unguided = replace(call, arguments={**call.arguments, "guidance_scale": 1.0})
    assert min(psnr(draw(stock, unguided), fast)) > 60
    with pytest.raises(UsageError, match="accelerated already"):
        accelerate(name, model)
    diffalign.restore(pipe)
    assert state_of(pipe) == before
    handle.remove()
    assert torch.equal(draw(pipe, call), plain)


def test_a_lora_for_guidance_stands_alone(tmp_path):
    folder = a_lora(tmp_path, "sd3", rank=2, seed=0)
    model = tiny.sd3_model()
    model.pipeline.load_lora_weights(folder)
    with pytest.raises(UsageError, match="carries a LoRA already.*Merge"):
        accelerate("sd3", model, guidance=folder)
    with pytest.raises(UsageError, match="guidance has no such choice"):
        accelerate("sd3", model, guidance=str(tmp_path / "missing"))
