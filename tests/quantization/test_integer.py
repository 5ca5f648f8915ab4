"""Integer products: equal to the arithmetic they stand for, by timestep, through files; and their calibration."""

import copy

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt
from diffalign.pipelines.registry import load_model
from diffalign.quantization.accounting import report
from diffalign.quantization.apply import quantization_config, quantize_model
from diffalign.quantization.backends import resolve
from diffalign.quantization.integer import IntegerLinear, StepClock, packed_like
from diffalign.quantization.layers import PackedConv2d, PackedLinear, PackSpec
from diffalign.quantization.observer import ActivationScales, InputObserver, best_scale
from diffalign.quantization.packed import pack_model, packable
from diffalign.tuning.calibration import Calibration, normal_timesteps, rows_at
from diffalign.tuning.evaluator import Drawing

PROMPTS = [Prompt(t, {}) for t in ("a photo of a ring", "a photo of two circles", "a red cross")]


def integer_layer(plain, scales, **kwargs):
    layer = packed_like(plain, PackSpec(8, None, activation_steps=len(scales), **kwargs))
    layer.fill(plain.weight, name="layer")
    layer.calibrate(torch.tensor(scales))
    layer.clock = StepClock(range(len(scales)))
    return layer


def rounded(value, scale):
    scale = torch.tensor(scale).bfloat16().float()
    return (value / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 37), (0, 37)])
def test_products_are_those_of_rounded_inputs_and_unpacked_weights(bias, shape):
    torch.manual_seed(0)
    layer = integer_layer(nn.Linear(37, 11, bias=bias), [0.02])
    value = torch.randn(shape)
    with torch.no_grad():
        expected = nn.functional.linear(rounded(value, 0.02), layer.dequantize(), layer.bias)
        torch.testing.assert_close(layer(value), expected, rtol=1e-5, atol=1e-5)


def test_outputs_have_the_inputs_dtype_and_autocasts():
    layer = integer_layer(nn.Linear(16, 8), [0.02])
    value = torch.randn(4, 16)
    with torch.no_grad():
        full = layer(value)
        half = layer(value.bfloat16())
        assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(value).dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.02 * full.norm()


def test_each_timestep_has_its_scale():
    torch.manual_seed(0)
    layer = integer_layer(nn.Linear(16, 8), [0.05, 0.001])
    value = torch.randn(4, 16)
    for index, scale in enumerate((0.05, 0.001)):
        layer.clock.index = index
        with torch.no_grad():
            expected = nn.functional.linear(rounded(value, scale), layer.dequantize(), layer.bias)
            torch.testing.assert_close(layer(value), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_without_a_scale_keeps_its_inputs():
    layer = integer_layer(nn.Linear(16, 8), [0.0])
    value = torch.randn(4, 16)
    with torch.no_grad():
        expected = nn.functional.linear(value, layer.dequantize(), layer.bias)
        torch.testing.assert_close(layer(value), expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass_as_through_any_packed_layer():
    torch.manual_seed(0)
    layer = integer_layer(nn.Linear(16, 8), [0.02])
    value = torch.randn(4, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(value).square().sum(), value)
    out = nn.functional.linear(value, layer.dequantize(), layer.bias)
    (expected,) = torch.autograd.grad(out.square().sum(), value)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_the_branch_gets_the_inputs_as_they_are():
    torch.manual_seed(0)
    layer = integer_layer(nn.Linear(16, 8), [0.02], svd_rank=2)
    value = torch.randn(4, 16)
    rest = layer._unpack(layer.weight, layer.weight_scale, torch.float32)
    with torch.no_grad():
        expected = nn.functional.linear(rounded(value, 0.02), rest, layer.bias)
        expected = expected + value @ (layer.svd_up @ layer.svd_down).mT
        torch.testing.assert_close(layer(value), expected, rtol=1e-4, atol=1e-5)


def test_other_weights_and_scales_are_noticed():
    torch.manual_seed(0)
    layer, other = (integer_layer(nn.Linear(16, 8), [s]) for s in (0.02, 0.3))
    value = torch.randn(4, 16)
    with torch.no_grad():
        before = layer(value)
        layer.load_state_dict(other.state_dict())
        assert not torch.equal(layer(value), before)
        assert torch.equal(layer(value), other(value))
        assert torch.equal(copy.deepcopy(layer)(value), other(value))


def test_the_second_copy_of_the_weights_is_counted():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    names = ActivationScales((1.0,), {"0": torch.tensor([0.02])})
    pack_model(
        model,
        spec=PackSpec(8, None, activation_steps=1),
        min_weights=0,
        activations=ActivationScales(names.timesteps, names.scales),
    )
    before = report(model).bytes
    with torch.no_grad():
        model[0](torch.randn(2, 64))
    assert report(model).bytes == before + 64 * 64


@pytest.mark.parametrize("outliers", [0.0, 0.001])
def test_the_best_scale_is_the_best_of_its_grid(outliers):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator)
    values[: int(outliers * 4096)] *= 40
    scale = best_scale(values)

    def error(s):
        return (rounded(values, s) - values).abs().pow(2.4).sum()

    largest = float(values.abs().max()) / 127
    assert error(scale) <= min(error(r * largest) for r in (0.25, 0.5, 0.75, 1.0)) * 1.001
    assert best_scale(torch.zeros(8)) == 0.0


def test_an_observer_keeps_timesteps_apart_and_rows_that_count():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.layer(sample)

    model = Denoiser()
    small, large = torch.full((3, 4), 0.5), torch.full((3, 4), 8.0)
    large[1:] = 1e6
    observer = InputObserver(model, ["layer"], by_timestep=True)
    with observer.watching():
        model(small, torch.tensor([2.0]))
        observer.rows = torch.tensor([0])
        model(large, timestep=7)
        observer.rows = torch.tensor([], dtype=torch.long)
        model(large, 9.0)
    assert not model._forward_pre_hooks
    assert not model.layer._forward_pre_hooks
    found = observer.scales()
    assert found.timesteps == (7.0, 2.0)
    assert (found.scales["layer"] * 127 <= torch.tensor([8.0, 0.5]) * 1.01).all()
    with pytest.raises(ValueError, match="nothing was sampled"):
        InputObserver(model, ["layer"], by_timestep=False).scales()


def test_drawn_timesteps_follow_the_law_that_is_cut_off():
    drawn = normal_timesteps(20_000, 0)
    assert 0 <= drawn.min() < drawn.max() <= 1
    inside = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.4
    inside = inside[(inside >= 0) & (inside <= 1)]
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(
        drawn.quantile(quantiles), inside[:200_000].quantile(quantiles), atol=0.015, rtol=0
    )


def test_images_are_kept_at_the_timestep_they_drew_not_at_its_mirror():
    """Steps are counted from noise, timesteps from clean."""
    model = tiny.sd_model()
    scheduler = model.scheduler_at(20, (16, 16))
    drawn = torch.tensor([0.05, 0.9, 0.5, 0.06])
    at = {int(r): i for i in range(20) for r in rows_at(i, scheduler, drawn)}
    assert sorted(at) == [0, 1, 2, 3]
    for row, i in at.items():
        assert abs(scheduler.timesteps[i] / 1000 - drawn[row]) < 0.04
    assert at[1] < at[2] < at[0]


def calibrated(model, steps, **kwargs):
    drawing = Drawing(num_inference_steps=steps, mixed_precision="no", **kwargs)
    return Calibration(model, PROMPTS, drawing)


def test_few_steps_get_scales_each_and_many_share_one():
    model = load_model("shapes-flux", dtype=torch.float32)
    few, many = (calibrated(model, n).activation_scales() for n in (2, 17))
    linear = [n for n, m in packable(model.denoiser).items() if isinstance(m, nn.Linear)]
    assert few.timesteps[0] == 1.0 > few.timesteps[1]
    assert few.scales.keys() == many.scales.keys() == set(linear)
    assert all(s.shape == (2,) and (s > 0).all() for s in few.scales.values())
    assert all(s.shape == (1,) and (s > 0).all() for s in many.scales.values())
    quantize_model(model.denoiser, "int8-static", activations=many)
    model.predict(
        torch.randn(1, *model.latent_shape((64, 64))),
        torch.tensor([300.0]),
        model.encode_prompt([PROMPTS[0].text]),
    )


def test_guided_models_are_calibrated_on_both_halves():
    """Of a doubled batch the rows of the second half count, too."""
    model = load_model("shapes-sd", dtype=torch.float32)
    plain = calibrated(model, 17).activation_scales()
    guided = calibrated(model, 17, guidance_scale=3.0).activation_scales()
    differ = [n for n in plain.scales if not torch.equal(plain.scales[n], guided.scales[n])]
    assert len(differ) > len(plain.scales) / 2
    with pytest.raises(UsageError, match="no linear layer of this sd model is large enough"):
        calibrated(tiny.sd_model(), 2).activation_scales()


@pytest.mark.parametrize("name", ["shapes-flux", "shapes-sd"])
def test_a_pipeline_is_saved_reloads_bit_equal_and_hardly_changes(name, tmp_path):
    model = load_model(name, dtype=torch.float32)
    pipeline = model.pipeline

    def image(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "np", "generator": generator}
        return pipe(PROMPTS[0].text, height=64, width=64, **options).images[0]

    before = image(pipeline)
    activations = calibrated(model, 2).activation_scales()
    assert quantize_model(model.denoiser, "int8-static", activations=activations) == "int8-static"
    kinds = {type(m) for m in model.denoiser.modules()}
    assert IntegerLinear in kinds
    assert PackedLinear not in kinds
    assert (PackedConv2d in kinds) == (name == "shapes-sd")
    expected = image(pipeline)
    assert 0 < np.abs(expected - before).mean() < 0.03
    pipeline.save_pretrained(tmp_path / "folder")
    again = DiffusionPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float32)
    assert np.array_equal(image(again), expected)
    assert np.array_equal(image(copy.deepcopy(again)), expected)


def test_a_scale_for_each_step_errs_less_than_one_for_all():
    errors = {}
    for shared in (False, True):
        model = load_model("shapes-flux", dtype=torch.float32)
        found = calibrated(model, 4).activation_scales()
        if shared:
            largest = {n: s.max()[None] for n, s in found.scales.items()}
            found = ActivationScales((0.0,), largest)
        embeds = model.encode_prompt([PROMPTS[0].text] * 4)
        scheduler = model.scheduler_at(4, (64, 64))
        shape = (4, *model.latent_shape((64, 64)))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        trajectory = []
        with torch.no_grad():
            for t in scheduler.timesteps:
                trajectory.append((latents, t, model.predict(latents, t.expand(4), embeds)))
                latents = scheduler.step(trajectory[-1][2], t, latents).prev_sample
            quantize_model(model.denoiser, "int8-static", activations=found)
            total = sum(
                (model.predict(latents, t.expand(4), embeds) - expected).norm().item()
                for latents, t, expected in trajectory
            )
        errors[shared] = total
    assert errors[False] < errors[True]


def test_what_is_missing_or_too_much_is_said():
    model = tiny.flux_model()
    with pytest.raises(UsageError, match="int8-static: this backend needs calibrated scales"):
        quantize_model(model.denoiser, "int8-static")
    scales = ActivationScales((1.0,), {})
    with pytest.raises(UsageError, match="int4: this backend leaves activations in 16 bits"):
        quantize_model(model.denoiser, "int4", activations=scales)
    with pytest.raises(UsageError, match="needs calibrated scales of activations"):
        quantization_config("int8-static", device="cpu")
    with pytest.raises(UsageError, match="8 or 4 bits and one scale for each row"):
        PackSpec(4, 64, activation_steps=2)
    with pytest.raises(UsageError, match="no prompt to calibrate with"):
        Calibration(model, [], Drawing())
    with pytest.raises(UsageError, match="int8-static: no gradient passes through"):
        resolve("int8-static", device="cpu", training=True)


def token_layer(plain, bits, **kwargs):
    layer = packed_like(plain, PackSpec(bits, None, token_scales=True, **kwargs))
    layer.fill(plain.weight, name="layer")
    return layer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 37), (0, 37)])
def test_each_token_has_its_own_scale(bits, bias, shape):
    torch.manual_seed(0)
    layer = token_layer(nn.Linear(37, 11, bias=bias), bits)
    assert "activation_scale" not in layer.state_dict()
    value = torch.randn(shape)
    if len(shape) > 1:
        value[..., :1, :] *= 100  # an own scale does not follow the others'
    with torch.no_grad():
        scale = value.abs().amax(-1, keepdim=True) / 127
        inputs = (value / scale).round().clamp(-128, 127) * scale
        expected = nn.functional.linear(inputs, layer.dequantize(), layer.bias)
        torch.testing.assert_close(layer(value), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_of_zeros_dtypes_and_the_branch(bits):
    torch.manual_seed(0)
    layer = token_layer(nn.Linear(32, 8), bits, svd_rank=2)
    value = torch.randn(4, 32)
    value[0] = 0
    with torch.no_grad():
        full = layer(value)
        torch.testing.assert_close(full[0], layer.bias.detach())
        plain = nn.functional.linear(value, layer.dequantize(), layer.bias)
        assert (full - plain).norm() < 0.02 * plain.norm()
        half = layer(value.bfloat16())
        assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        assert (half.float() - full).norm() < 0.02 * full.norm()


def test_four_bits_are_expanded_once_and_counted():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Conv2d(4, 4, 3))
    pack_model(model, spec=PackSpec(4, None, token_scales=True), min_weights=0)
    assert model[1].spec.group_size == 64
    before = report(model).bytes
    with torch.no_grad():
        model[0](torch.randn(2, 64))
    assert report(model).bytes == before + 64 * 64
    value = torch.randn(4, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(model[0](value).square().sum(), value)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["int8-dynamic", "int4a8"])
@pytest.mark.parametrize("name", ["shapes-flux", "shapes-sd"])
def test_models_by_token_reload_bit_equal_without_calibration(backend, name, tmp_path):
    model = load_model(name, dtype=torch.float32)
    embeds = model.encode_prompt([p.text for p in PROMPTS])
    noisy = torch.randn(3, *model.latent_shape((64, 64)))
    time = torch.full((3,), 500.0)
    with torch.no_grad():
        before = model.predict(noisy, time, embeds)
        assert quantize_model(model.denoiser, backend) == backend
        after = model.predict(noisy, time, embeds)
    assert {IntegerLinear} <= {type(m) for m in model.denoiser.modules()}
    assert (
        0
        < (after - before).norm()
        < {"int8-dynamic": 0.03, "int4a8": 0.25}[backend] * before.norm()
    )
    model.denoiser.save_pretrained(tmp_path)
    again = type(model.denoiser).from_pretrained(tmp_path, torch_dtype=torch.float32)
    setattr(model.pipeline, model.denoiser_part, again)
    with torch.no_grad():
        assert torch.equal(model.predict(noisy, time, embeds), after)
    with pytest.raises(UsageError, match="no gradient passes through"):
        quantization_config(backend, device="cpu", training=True)


def test_a_scale_for_each_token_errs_less_than_one_for_each_step():
    errors = {}
    for backend in ("int8-static", "int8-dynamic"):
        model = load_model("shapes-flux", dtype=torch.float32)
        options = {}
        if backend == "int8-static":
            options["activations"] = calibrated(model, 2).activation_scales()
        embeds = model.encode_prompt([p.text for p in PROMPTS])
        noisy = torch.randn(
            3, *model.latent_shape((64, 64)), generator=torch.Generator().manual_seed(0)
        )
        time = model.scheduler_at(2, (64, 64)).timesteps[0].expand(3)
        with torch.no_grad():
            plain = model.predict(noisy, time, embeds)
            quantize_model(model.denoiser, backend, **options)
            errors[backend] = (model.predict(noisy, time, embeds) - plain).square().sum()
    assert errors["int8-dynamic"] < 0.5 * errors["int8-static"]
