"""The exact way back: what `restore` brings back, and what it names."""

import logging
from functools import partial

import pytest
import tiny
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

import diffalign
from diffalign import lora
from diffalign.acceleration.state import differences, state_of
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import WORDS, checksum
from diffalign.quantization import apply as quantization

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.bool)


def accelerated(model, **options):
    given = {
        "steps": 9,
        "sizes": (model.default_size,),
        "arguments": {"max_sequence_length": 16},
        "prompts": ("a cat",),
        "check": 1,
        "floor": 3.0,
    }
    return diffalign.accelerate(model.pipeline, "balanced", **given | options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_a_checksum_sees_every_value(dtype, n):
    octets = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n))
    tensor = octets.to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    for i in range(0, n, max(1, n // 5)):
        other = octets.clone()
        other[i] = 1 - other[i]
        assert checksum(other.to(dtype)) != before


def test_a_checksum_sees_one_bit_anywhere_and_the_order():
    words = torch.arange(2 * WORDS + 5)
    before = checksum(words)
    for place in (0, WORDS - 1, WORDS, 2 * WORDS + 4):
        for bit in (0, 31, 63):
            words[place] ^= 1 << bit if bit < 63 else -(1 << 63)
            assert checksum(words) != before
            words[place] ^= 1 << bit if bit < 63 else -(1 << 63)
    words[[3, 9]] = words[[9, 3]]
    assert checksum(words) != before


def test_a_checksum_does_not_depend_on_the_place_in_memory():
    values = torch.randn(101)
    padded = torch.zeros(204)
    padded[1:102] = values
    assert checksum(padded[1:102]) == checksum(values)
    strided = torch.zeros(202)
    strided[::2] = values
    assert checksum(strided[::2]) == checksum(values)


def edit(model):
    with torch.no_grad():
        model.denoiser.transformer_blocks[0].ff.net[2].weight[-1, -1] += 1e-3


def edit_past_the_counter(model):
    # peft fuses a LoRA in this way, which torch's version counters do not see
    model.denoiser.proj_out.weight.data[-1, -1] += 1e-3


def edit_text_encoder(model):
    model.pipeline.text_encoder.get_input_embeddings().weight.data[-1, -1] += 1e-3


def replace_parameter(model):
    layer = model.denoiser.proj_out
    layer.weight = torch.nn.Parameter(layer.weight + 1e-3)


def cast(model):
    model.pipeline.vae.to(torch.float16)


def load_lora(model):
    lora.attach(model.denoiser, rank=2, alpha=4, targets=model.lora_targets, policies=("style",))


def swap_scheduler(model):
    scheduler = model.pipeline.scheduler
    model.pipeline.scheduler = type(scheduler).from_config(scheduler.config)


def configure_scheduler(model):
    model.pipeline.scheduler.register_to_config(shift=9.0)


def replace_denoiser(model):
    model.pipeline.transformer = tiny.sd3_pipeline().transformer


def replace_decoder(model):
    model.pipeline.vae = tiny.sd3_pipeline().vae


def replace_block(model):
    model.denoiser.transformer_blocks[0] = tiny.sd3_pipeline().transformer.transformer_blocks[0]


def drop_block(model):
    model.denoiser.transformer_blocks = model.denoiser.transformer_blocks[1:]


def scale_latents(model):
    model.pipeline.vae.register_to_config(scaling_factor=0.2)


def train(model):
    model.denoiser.train()


def hook(model):
    model.denoiser.register_forward_hook(lambda *_: None)


def tile(model):
    model.pipeline.vae.enable_slicing()


CHANGES = {
    edit: r"weights of transformer \(transformer_blocks.0.ff.net.2.weight\)",
    edit_past_the_counter: r"weights of transformer \(proj_out.weight\)",
    edit_text_encoder: r"weights of text_encoder \(",
    replace_parameter: r"weights of transformer \(proj_out.weight\)",
    cast: r"weights of vae \(.* more\)",
    load_lora: r"LoRA of transformer \(.*unload_lora_weights",
    swap_scheduler: r"restore: scheduler \(another object\): changed",
    configure_scheduler: r"settings of scheduler \(shift\)",
    replace_denoiser: r"restore: transformer \(another object\): changed",
    replace_decoder: r"restore: vae \(another object\): changed",
    replace_block: r"modules of transformer \(transformer_blocks.0, .* more\)",
    drop_block: r"weights of transformer \(transformer_blocks",
    scale_latents: r"settings of vae \(scaling_factor\)",
    train: r"modules of transformer \(itself, .* more\)",
    hook: "hooks of transformer",
    tile: "tiling of vae",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_restore_names_what_something_else_changed(sd3, change):
    accelerated(sd3)
    change(sd3)
    with pytest.raises(UsageError, match=CHANGES[change]):
        diffalign.restore(sd3.pipeline)
    # what `accelerate` did is undone all the same
    assert "_compiled_call_impl" not in vars(sd3.pipeline.transformer)
    assert "step" not in vars(sd3.pipeline.scheduler)


def test_a_lora_that_was_there_before_stays(sd3):
    load_lora(sd3)
    # a LoRA that is zero has no effect, which is refused
    for name, weight in sd3.denoiser.named_parameters():
        if "lora_B" in name:
            weight.data += 1
    before = state_of(sd3.pipeline)
    accelerated(sd3, check=0)
    diffalign.restore(sd3.pipeline)
    assert differences(before, state_of(sd3.pipeline)) == []
    accelerated(sd3, check=0)
    for name, weight in sd3.denoiser.named_parameters():
        if "lora_B.style" in name:
            weight.data += 1
    with pytest.raises(UsageError, match=r"restore: LoRA of transformer \(style\): changed"):
        diffalign.restore(sd3.pipeline)


def test_a_lora_on_quantised_weights_is_gone_with_a_warning(sd3, caplog, monkeypatch):
    small = partial(quantization.quantize_model, min_weights=64)
    monkeypatch.setattr(quantization, "quantize_model", small)
    accelerated(sd3, quantize="int8", cache=False, check=0)
    lora.attach(sd3.denoiser, rank=2, alpha=4, targets=sd3.lora_targets, policies=("style",))
    with caplog.at_level(logging.WARNING):
        diffalign.restore(sd3.pipeline)
    assert "style" in caplog.text
    assert "load it again" in caplog.text


def test_restore_compares_pixels(sd3, monkeypatch):
    accelerated(sd3)
    diffalign.restore(sd3.pipeline, check=True)
    accelerated(sd3, check=0)
    with pytest.raises(UsageError, match="check=0"):
        diffalign.restore(sd3.pipeline, check=True)
    # the refusal came before anything was undone
    diffalign.restore(sd3.pipeline)
    accelerated(sd3)
    diffalign.acceleration(sd3.pipeline).reference.plain += 1
    with pytest.raises(UsageError, match="its images are not"):
        diffalign.restore(sd3.pipeline, check=True)


def test_a_process_wide_backend_that_changed_is_named(sd3, monkeypatch):
    accelerated(sd3, check=0)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", "other")
    with pytest.raises(UsageError, match="attention backend"):
        diffalign.restore(sd3.pipeline)
