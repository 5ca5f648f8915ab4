"""Compiled blocks of an accelerated pipeline: one compilation for each declared size, and none for others."""

import logging

import pytest
import tiny
import torch
from compilation import counted
from marks import slow_except

import diffalign
from diffalign.acceleration.compilation import compile_parts
from diffalign.acceleration.declared import Declared
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.state import state_of
from diffalign.acceleration.undo import Undo

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
# the cheapest of each kind is enough for every change; dynamo traces a block for a second
NAMES = slow_except(["flux"], ["flux", "sana", "sd", "sdxl", "sd3"])


@pytest.fixture
def counter(monkeypatch):
    with counted(monkeypatch, "eager") as counter:
        yield counter


def a_call(name, model, *, scale=(1, 1)):
    length = {} if name in tiny.UNETS else {"max_sequence_length": 16}
    height, width = model.default_size
    return Call(2, height * scale[0], width * scale[1], ("a cat",), length)


@pytest.mark.parametrize("name", NAMES)
def test_declared_sizes_compile_once_and_others_never(name, counter, caplog):
    model = FAMILIES[name]()
    pipe = model.pipeline
    small, large, other = (a_call(name, model, scale=s) for s in ((1, 1), (2, 1), (2, 2)))
    plain = [draw(pipe, call) for call in (small, large, other)]
    before = state_of(pipe)
    sizes = tuple((call.height, call.width) for call in (small, large))
    given = {"steps": 2, "check": 0, "arguments": small.arguments, "compile": "blocks"}
    diffalign.accelerate(pipe, "lossless", sizes=sizes, **given)
    compilations = []
    for call, expected in zip((small, large), plain, strict=False):
        assert min(psnr(draw(pipe, call), expected)) > 80
        compilations.append(counter.frame_count)
    assert 0 < compilations[0] < compilations[1]
    with caplog.at_level(logging.WARNING):
        for call, expected in zip(
            (other, small, large, other), [plain[i] for i in (2, 0, 1, 2)], strict=True
        ):
            assert min(psnr(draw(pipe, call), expected)) > 80
        pair = Call(2, *sizes[0], ("a cat", "a dog"), small.arguments)
        pairs = [draw(pipe, pair), draw(pipe, pair)]
    assert counter.frame_count == compilations[1]
    assert caplog.text.count("none of the declared sizes") == 1
    assert caplog.text.count("2 images at a time are none of the declared numbers (1)") == 1
    assert f"{sizes[1][0]} x {sizes[1][1]} pixels" in str(diffalign.acceleration(pipe))
    diffalign.restore(pipe)
    assert state_of(pipe) == before
    assert "prepare_latents" not in vars(pipe)
    assert torch.equal(draw(pipe, other), plain[2])
    assert all(torch.equal(images, draw(pipe, pair)) for images in pairs)


class Watched(torch.nn.Module):
    """Denoiser with one block, which attends to a text with a mask."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Attending()])

    def forward(self, hidden_states, encoder_hidden_states=None, encoder_attention_mask=None):
        return self.blocks[0](hidden_states, encoder_hidden_states, encoder_attention_mask)


class Attending(torch.nn.Module):
    def forward(self, states, text, mask):
        bias = None if mask is None else torch.where(mask.bool(), 0.0, float("-inf"))[:, None]
        return torch.nn.functional.scaled_dot_product_attention(states, text, text, attn_mask=bias)


class Holder:
    """Pipeline of nothing but a denoiser."""

    def __init__(self):
        self.transformer = Watched()


def watched():
    holder = Holder()
    undo = Undo.__new__(Undo)
    undo._steps = []
    compile_parts(holder, Declared(((8, 8),), (1,)), undo)
    return holder.transformer, undo


def test_a_masked_text_is_padded_to_the_compiled_tokens_exactly(counter):
    torch.manual_seed(0)
    model, undo = watched()
    states, text = torch.randn(2, 5, 4), torch.randn(2, 7, 4)
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    model(states, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert counter.frame_count == 1
    short = {"encoder_hidden_states": text[:, :5], "encoder_attention_mask": mask[:, :5]}
    padded = model(states, **short)
    assert counter.frame_count == 1
    undo.back()
    assert model.blocks[0]._compiled_call_impl is None
    assert not model._forward_pre_hooks
    torch.testing.assert_close(padded, model(states, **short), rtol=1e-6, atol=1e-6)


def test_a_text_that_cannot_be_padded_is_told_and_runs_uncompiled(counter, caplog):
    model, undo = watched()
    states, text = torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    with caplog.at_level(logging.WARNING):
        model(states, encoder_hidden_states=text[:, :7])
        outputs = [model(states, encoder_hidden_states=text[:, :n]) for n in (5, 9, 5)]
        longer = model(states, encoder_hidden_states=text, encoder_attention_mask=torch.ones(2, 9))
    assert counter.frame_count == 1
    assert caplog.text.count("a text of 5 tokens") == caplog.text.count("a text of 9 tokens") == 1
    undo.back()
    assert torch.equal(outputs[0], model(states, encoder_hidden_states=text[:, :5]))
    torch.testing.assert_close(longer, model(states, encoder_hidden_states=text))


def test_a_plan_keeps_all_its_sizes(tmp_path, sd3):
    sizes = ((16, 16), (16, 8))
    diffalign.accelerate(sd3.pipeline, "lossless", sizes=sizes, steps=2, check=0)
    file = diffalign.acceleration(sd3.pipeline).save(tmp_path)
    diffalign.restore(sd3.pipeline)
    diffalign.accelerate(sd3.pipeline, file)
    assert diffalign.acceleration(sd3.pipeline).plan.sizes == sizes
