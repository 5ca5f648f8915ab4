"""Bits by layer: the best allocation of small tables, by enumeration, and whole models with a mean of their own."""

import itertools
import json

import numpy as np
import pytest
import tiny
import torch

from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt
from diffalign.quantization.accounting import report
from diffalign.quantization.apply import quantization_config, quantize_model
from diffalign.quantization.layers import PackedLayer
from diffalign.quantization.packed import packable
from diffalign.quantization.quantizer import PackedConfig
from diffalign.tuning.allocation import LayerErrors, allocate, choose_bits, kind_of
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.evaluator import Drawing
from diffalign.tuning.scales import Trajectories

PROMPTS = [Prompt(f"a photo of {n} circles", {}) for n in range(4)]


def entry(weights, errors):
    return LayerErrors(weights, errors, {bits: bits * weights for bits in errors})


def test_steps_are_taken_where_they_save_most_per_bit():
    """By hand: at a mean of 3 there is one bit for each of the two layers, or two for one of them."""
    table = {
        "sensitive": entry(10, {2: 100.0, 3: 10.0, 4: 1.0}),
        "free": entry(10, {2: 1.0, 3: 0.1, 4: 0.01}),
    }
    assert allocate(table, 2) == {"sensitive": 2, "free": 2}
    assert allocate(table, 2.5) == {"sensitive": 3, "free": 2}
    assert allocate(table, 3) == {"sensitive": 4, "free": 2}
    assert allocate(table, 3.5) == {"sensitive": 4, "free": 3}
    assert allocate(table, 99) == {"sensitive": 4, "free": 4}


def test_a_step_that_is_not_on_the_hull_is_left_out():
    table = {"a": entry(1, {2: 10.0, 3: 9.9, 4: 0.0}), "b": entry(1, {2: 3.0, 3: 1.0, 4: 0.9})}
    assert allocate(table, 3) == {"a": 4, "b": 2}


@pytest.mark.parametrize("seed", range(6))
def test_the_allocation_is_near_the_best_of_all(seed):
    """Greedy on convex hulls loses at most what the last step would have saved."""
    rng = np.random.default_rng(seed)
    table = {}
    for name in "abcdef":
        scale = float(10 ** rng.uniform(-2, 2))
        table[name] = entry(
            10, {b: scale * 4.0**-b * float(rng.uniform(0.8, 1.2)) for b in (2, 3, 4)}
        )
    chosen = allocate(table, 3)
    every = [dict(zip(table, bits, strict=True)) for bits in itertools.product((2, 3, 4), repeat=6)]

    def error(bits):
        return sum(table[n].errors[b] for n, b in bits.items())

    assert sum(chosen.values()) <= 18
    best = min(error(bits) for bits in every if sum(bits.values()) <= 18)
    above = min(error(bits) for bits in every if sum(bits.values()) <= 17)
    assert best <= error(chosen) <= max(above, best * 1.01)


def test_layers_without_errors_keep_the_most_bits():
    table = {"missed": LayerErrors(10, {}, {2: 20, 4: 40}), "a": entry(10, {2: 1.0, 4: 0.1})}
    assert allocate(table, 3) == {"missed": 4, "a": 2}


def test_kinds_are_names_without_places():
    assert kind_of("transformer_blocks.11.ff.net.0.proj") == "ff.net.proj"
    assert kind_of("transformer_blocks.0.ff_context.net.2") == "ff_context.net"
    names = ("down_blocks.0.resnets.1.conv1", "mid_block.resnets.0.conv1")
    assert {kind_of(n) for n in names} == {"resnets.conv1"}
    assert kind_of("proj") == "proj"


@pytest.fixture(scope="module")
def chosen():
    torch.manual_seed(0)
    model = tiny.flux_model()
    calibration = Calibration(model, PROMPTS, Drawing(2, mixed_precision="no"))
    before = {n: p.clone() for n, p in model.denoiser.named_parameters()}
    layers = packable(model.denoiser, min_weights=64)
    bits = choose_bits(
        layers,
        calibration.moments(min_weights=64),
        Trajectories.record(calibration),
        bits_per_weight=3.5,
        group_size=32,
    )
    assert all(torch.equal(p, before[n]) for n, p in model.denoiser.named_parameters())
    return model, calibration, bits


def test_a_model_has_the_mean_that_was_asked_for_and_reloads(chosen, tmp_path):
    model, calibration, bits = chosen
    assert set(bits) == set(packable(model.denoiser, min_weights=64))
    assert len(set(bits.values())) > 1
    moments = calibration.moments(min_weights=64)
    quantize_model(
        model.denoiser, "mixed", group_size=32, min_weights=64, moments=moments, bits=bits
    )
    packed = {n: m for n, m in model.denoiser.named_modules() if isinstance(m, PackedLayer)}
    assert {n: m.spec.bits for n, m in packed.items()} == bits
    sizes = [sum(tiny.tensor_bytes(t) for t in (m.weight, m.weight_scale)) for m in packed.values()]
    mean = 8 * sum(sizes) / sum(m.shape.numel() for m in packed.values())
    assert 3 < mean <= 3.5
    model.denoiser.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["bits"] == bits
    assert saved["format"] == 2
    again = type(model.denoiser).from_pretrained(tmp_path)
    state = model.denoiser.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in again.state_dict().items())
    assert report(again).bytes == report(model.denoiser).bytes


def test_what_cannot_be_is_said(tmp_path):
    model = tiny.flux_model()
    calibration = Calibration(model, PROMPTS, Drawing(2, mixed_precision="no"))
    layers = packable(model.denoiser, min_weights=64)
    options = {"bits_per_weight": 2.0, "group_size": 64}
    with pytest.raises(UsageError, match=r"bits_per_weight=2 is below 2\.\d+, the mean at the"):
        choose_bits(layers, [], Trajectories.record(calibration), **options)
    with pytest.raises(UsageError, match="mixed: each layer needs its number of bits"):
        quantize_model(model.denoiser, "mixed")
    with pytest.raises(UsageError, match="mixed: each layer needs its number of bits"):
        quantization_config("mixed", device="cpu")
    with pytest.raises(UsageError, match="int4: this backend has one number of bits. Use mixed"):
        quantize_model(model.denoiser, "int4", bits={"a": 4})
    with pytest.raises(UsageError, match="has no number of bits"):
        quantize_model(model.denoiser, "mixed", min_weights=64, moments=[], bits={"a": 4})
    with pytest.raises(UsageError, match="bits=5: there is no such format"):
        PackedConfig(bits={"a": 5})
    tiny.flux_pipeline().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="bits by layer need a loaded model"):
        type(model.denoiser).from_pretrained(
            tmp_path, subfolder="transformer", quantization_config=PackedConfig(bits={"a": 4})
        )
