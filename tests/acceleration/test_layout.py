"""Weights of convolutions with their channels last, and the rules of float8."""

import pytest
import tiny
import torch

import diffalign
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.rules import Situation, settle
from diffalign.core.errors import UsageError


def layouts(pipe):
    parts = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer, pipe.vae)
    return [p.stride() for part in parts for p in part.parameters()]


@pytest.mark.parametrize("model", [tiny.sd_model, tiny.sana_model])
def test_channels_last_changes_the_layout_alone_and_goes_back(model):
    model = model()
    pipe = model.pipeline
    length = {"max_sequence_length": 16} if model.family == "sana" else {}
    call = Call(2, *model.default_size, ("a cat",), length)
    plain, before = draw(pipe, call), layouts(pipe)
    given = {"steps": 2, "sizes": (model.default_size,), "arguments": length, "check": 1}
    diffalign.accelerate(pipe, "lossless", layout="channels_last", **given)
    assert diffalign.acceleration(pipe).applied == {"layout": "channels_last"}
    assert layouts(pipe) != before
    assert min(psnr(draw(pipe, call), plain)) > 90
    diffalign.restore(pipe)
    assert layouts(pipe) == before
    assert torch.equal(draw(pipe, call), plain)


HOPPER = Situation(device="cuda", capability=(9, 0))


def test_float8_needs_a_device_and_compiled_blocks():
    named = {"quantize": ("torchao-fp8", True), "compile": ("blocks", False)}
    assert set(settle(named, HOPPER)[0]) == {"quantize", "compile"}
    for options, situation, words in (
        ({"quantize": ("torchao-fp8", True)}, HOPPER, "compile the blocks"),
        (named, Situation(device="cuda", capability=(8, 6)), "compute capability 8.9"),
        (named, Situation(), "compute capability 8.9"),
    ):
        with pytest.raises(UsageError, match=words):
            settle(options, situation)


def test_what_a_later_rule_drops_counts_for_an_earlier_one():
    options = {"quantize": ("torchao-int8", False), "compile": ("blocks", False)}
    kept, dropped = settle(options, Situation(device="cpu"))
    assert kept == {}
    assert [d.option for d in dropped] == ["compile", "quantize"]
