"""Scales that are tuned while codes stay: gradients by hand, what is folded, and that predictions err less."""

import copy

import pytest
import tiny
import torch
from marks import slow
from torch import nn

from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt
from diffalign.quantization.layers import PackedLayer, PackSpec
from diffalign.quantization.packed import pack_model
from diffalign.quantization.tuned import TunedLayer, tunable
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.evaluator import Drawing
from diffalign.tuning.scales import Trajectories, decibels, tune_scales

PROMPTS = [Prompt(f"a photo of {n} circles", {}) for n in range(9)]
LAYERS = [
    (nn.Linear(37, 11), (5, 37)),
    (nn.Linear(32, 8, bias=False), (2, 3, 32)),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 6, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
]


def packed_layer(layer, **kwargs):
    module = nn.Sequential(copy.deepcopy(layer))
    pack_model(module, spec=PackSpec(**kwargs), min_weights=0)
    return module[0]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("svd_rank", [0, 2])
def test_factors_of_one_change_nothing_and_have_the_gradient_of_the_scales(layer, shape, svd_rank):
    """The gradient to a factor is the sum over its group of the weight times the weight's gradient."""
    torch.manual_seed(0)
    packed = packed_layer(layer, bits=3, group_size=16, svd_rank=svd_rank)
    value = torch.randn(shape)
    expected = packed(value)
    tuned = TunedLayer(packed)
    torch.testing.assert_close(tuned.forward(value), expected)
    rest = packed._unpack(packed.weight, packed.weight_scale, torch.float32)
    weight = rest.clone().requires_grad_()
    plain = copy.deepcopy(layer)
    plain.weight.data.zero_()
    out = torch.func.functional_call(plain, {"weight": weight}, value)
    if svd_rank:
        out = out + packed._branch(packed._padded(value), packed.svd_down, packed.svd_up)
    out.square().sum().backward()
    tuned.forward(value).square().sum().backward()
    products = (weight.grad * rest).flatten(1)
    by_group = [part.sum(1) for part in products.split(16, 1)]
    torch.testing.assert_close(tuned.factor.grad, torch.stack(by_group, 1), rtol=1e-4, atol=1e-4)
    if packed.bias is not None:
        torch.testing.assert_close(tuned.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)


def test_folding_scales_the_weights_and_leaves_the_codes():
    packed = packed_layer(nn.Linear(32, 8), bits=4, group_size=16)
    before, codes = packed.dequantize(), packed.weight.clone()
    tuned = TunedLayer(packed)
    with torch.no_grad():
        tuned.factor[:, 1] = 2.0
        tuned.bias += 1
    bias = packed.bias.clone()
    tuned.fold()
    assert torch.equal(packed.weight, codes)
    assert torch.equal(packed.dequantize()[:, :16], before[:, :16])
    assert torch.equal(packed.dequantize()[:, 16:], 2 * before[:, 16:])
    assert torch.equal(packed.bias, bias + 1)


def test_the_model_is_as_before_after_the_context():
    model = tiny.flux_model().denoiser
    pack_model(model, spec=PackSpec(3), min_weights=64)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable

    def fail():
        with tunable(model) as layers:
            assert layers
            assert not any(p.requires_grad for p in model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    for layer in model.modules():
        assert "forward" not in vars(layer)


def calibration_of(model, guidance_scale=None):
    drawing = Drawing(2, guidance_scale, mixed_precision="no", micro_batch_size=4)
    return Calibration(model, PROMPTS, drawing)


@pytest.mark.parametrize(
    ("family", "guidance"),
    [("flux", None), slow("sd", 3.0)],
)
def test_predictions_of_held_out_prompts_err_less(family, guidance):
    torch.manual_seed(0)
    model = {**tiny.MODELS, **tiny.UNETS}[family]()
    trajectories = Trajectories.record(calibration_of(model, guidance))
    rows = len(PROMPTS) * 2
    assert len(trajectories.inputs) == len(trajectories.predictions) == rows
    assert trajectories.mean_error(torch.arange(rows)) < 1e-9  # the model itself
    pack_model(model.denoiser, spec=PackSpec(2), min_weights=64)
    packed = [m for m in model.denoiser.modules() if isinstance(m, PackedLayer)]
    codes = [m.weight.clone() for m in packed]
    held_out = trajectories.rows_of(held_out=True)
    assert set(trajectories.prompts[held_out].tolist()) == {0, 8}
    state = torch.get_rng_state()
    result = tune_scales(trajectories, steps=12)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.accepted
    assert result.after < result.before - 0.5
    assert decibels(trajectories.mean_error(held_out)) == pytest.approx(result.after, abs=0.2)
    assert all(torch.equal(m.weight, c) for m, c in zip(packed, codes, strict=True))


def test_scales_that_do_not_get_better_stay(monkeypatch):
    torch.manual_seed(0)
    model = tiny.flux_model()
    trajectories = Trajectories.record(calibration_of(model))
    pack_model(model.denoiser, spec=PackSpec(2), min_weights=64)
    before = {n: v.clone() for n, v in model.denoiser.state_dict().items()}
    monkeypatch.setattr("diffalign.tuning.scales.LEARNING_RATE", 1e3)
    result = tune_scales(trajectories, steps=2)
    assert not result.accepted
    assert all(torch.equal(v, before[n]) for n, v in model.denoiser.state_dict().items())


def test_what_cannot_be_tuned_is_said():
    model = tiny.flux_model()
    trajectories = Trajectories.record(calibration_of(model))
    with pytest.raises(UsageError, match="tune_steps=3: the model has no packed weights"):
        tune_scales(trajectories, steps=3)
    pack_model(model.denoiser, spec=PackSpec(2), min_weights=64)
    model.denoiser.proj_out.weight.data[0, 0] = torch.nan
    with pytest.raises(UsageError, match="tune_steps: predictions of the quantised model are not"):
        tune_scales(trajectories, steps=3)
