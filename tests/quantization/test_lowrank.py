"""SVDQuant's branch: what it must be at its ends, that it helps, and that it travels with the layer."""

from itertools import pairwise

import pytest
import tiny
import torch
from marks import slow
from torch import nn

from diffalign import lora
from diffalign.core.errors import UsageError
from diffalign.pipelines.registry import load_model
from diffalign.quantization import codes, lowrank
from diffalign.quantization.apply import quantize_model
from diffalign.quantization.layers import PackedLayer, PackSpec
from diffalign.quantization.lowrank import collect_input_scales, decompose, truncated_svd
from diffalign.quantization.packed import pack_model


def spectrum(rows, columns, power=1.0):
    """A matrix whose singular values fall as 1 / k^power, with a few large columns, as trained ones have."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    rank = min(rows, columns)
    values = torch.arange(1, rank + 1) ** -power
    weight = u[:, :rank] * values @ v[:, :rank].mT
    weight[:, ::29] *= 4
    return weight


def rebuilt(found, shape, bits=4):
    rest = codes.unpack(found.packed, found.scales, shape=shape, bits=bits, group_size=64)
    return rest + (found.up.float() @ found.down.float()).view(shape)


def error(weight, **kwargs):
    found = decompose(weight, bits=4, **kwargs)
    return (rebuilt(found, weight.shape) - weight).square().sum().item()


@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
def test_the_error_falls_with_the_rank(shape):
    weight = spectrum(*shape)
    packed, scales = codes.pack(weight, bits=4)
    plain = codes.unpack(packed, scales, shape=shape, bits=4, group_size=64)
    errors = [(plain - weight).square().sum().item()]
    errors += [error(weight, rank=r) for r in (1, 2, 4, 8, 16, 32, 64, 96)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[4] < 0.5 * errors[0]


def test_no_rank_is_plain_packing():
    layer = nn.Sequential(nn.Linear(64, 32))
    plain = nn.Sequential(nn.Linear(64, 32))
    plain.load_state_dict(layer.state_dict())
    pack_model(layer, spec=PackSpec(4, svd_rank=0), min_weights=0)
    packed, scales = codes.pack(plain[0].weight, bits=4)
    assert torch.equal(layer[0].weight, packed)
    assert torch.equal(layer[0].weight_scale.view(torch.bfloat16), scales)
    assert set(layer.state_dict()) == {"0.weight", "0.weight_scale", "0.bias"}


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("shape", [(48, 96), (32, 6, 3, 3)])
def test_full_rank_is_the_weight_to_its_precision(dtype, relative, shape):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(dtype)
    rank = min(shape[0], weight[0].numel())
    found = decompose(weight, rank=rank, bits=4, rounds=0)
    assert found.up.dtype == found.down.dtype == dtype
    whole = rebuilt(found, shape)
    assert (whole - weight.float()).norm() < relative * weight.float().norm()


def test_rounds_help_and_never_harm():
    weight = spectrum(96, 128)
    errors = [error(weight, rank=8, rounds=rounds) for rounds in (0, 1, 3, 10, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.9 * errors[0]


def test_the_rounding_of_the_branch_is_packed_with_the_rest():
    """In bfloat16 the branch is off by 0.4 %, the sum is not."""
    weight = spectrum(96, 128, power=2.0).bfloat16()
    found = decompose(weight, rank=16, bits=8)
    exact = decompose(weight.float(), rank=16, bits=8)
    whole, finer = (rebuilt(f, weight.shape, bits=8) - weight.float() for f in (found, exact))
    assert whole.norm() < 1.5 * finer.norm() + 1e-4 * weight.float().norm()


def output_error(weight, inputs, **kwargs):
    found = decompose(weight, rank=8, bits=4, **kwargs)
    return (inputs @ (rebuilt(found, weight.shape) - weight).mT).norm()


def test_a_branch_fitted_to_the_inputs_takes_the_weights_of_large_ones():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 128, generator=generator)
    sizes = torch.ones(128)
    sizes[::41] = 30
    inputs = torch.randn(1024, 128, generator=generator) * sizes
    known = output_error(weight, inputs, input_scale=inputs.square().mean(0).sqrt())
    assert known < 0.3 * output_error(weight, inputs)


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
def test_a_branch_fitted_to_the_inputs_is_no_worse(spread):
    """As one is with s = a^0.5 here: it leaves large weights of small inputs to the scales of their groups."""
    weight = spectrum(96, 128, power=0.5)
    generator = torch.Generator().manual_seed(2)
    sizes = torch.rand(128, generator=generator) ** spread
    inputs = torch.randn(4096, 128, generator=generator) * sizes
    known = output_error(weight, inputs, input_scale=inputs.square().mean(0).sqrt())
    assert known < 1.01 * output_error(weight, inputs)


def test_inputs_that_never_come_do_no_harm():
    weight = spectrum(32, 64)
    silent = torch.ones(64)
    silent[:32] = 0
    for scale in (silent, torch.zeros(64)):
        found = decompose(weight, rank=4, bits=4, input_scale=scale)
        assert rebuilt(found, weight.shape).isfinite().all()


def test_the_exact_svd_is_the_best_and_the_random_one_near_it_and_repeatable(monkeypatch):
    weight = spectrum(96, 128)
    u, s, v = torch.linalg.svd(weight)
    best = u[:, :8] * s[:8] @ v[:8]
    up, down = truncated_svd(weight, 8)
    torch.testing.assert_close(up @ down, best, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(lowrank, "EXACT", 16)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = truncated_svd(weight, 8), truncated_svd(weight, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    left = (weight - first[0] @ first[1]).norm()
    assert left < 1.001 * (weight - best).norm()


def test_input_scales_are_root_mean_squares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(16, 2))
    first, second = torch.randn(2, 3, 6, 6), torch.randn(1, 3, 6, 6) * 3

    def run():
        model(first)
        model(second)

    scales = collect_input_scales(model, run)
    both = torch.cat([first, second])
    torch.testing.assert_close(scales["0"], both.square().mean((0, 2, 3)).sqrt())
    middle = model[0](both).flatten(2)
    torch.testing.assert_close(scales["2"], middle.square().mean((0, 1)).sqrt())
    assert not model[0]._forward_pre_hooks


def test_hooks_go_when_the_run_fails():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError):
        collect_input_scales(model, lambda: 1 / 0)
    assert not model[0]._forward_pre_hooks


def test_layers_compute_with_their_branch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 8))
    value = torch.randn(2, 8, 8, 8, requires_grad=True)
    pack_model(model, spec=PackSpec(4, svd_rank=4), min_weights=0)
    out = model(value)
    conv = nn.functional.conv2d(value, model[0].dequantize(), model[0].bias, 2, 1)
    expected = nn.functional.linear(conv.flatten(2), model[2].dequantize(), model[2].bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), value)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_switching_adapters_leaves_the_branch_on():
    model = tiny.flux_model()
    pack_model(model.denoiser, spec=PackSpec(4, svd_rank=4), min_weights=64)
    embeds = model.encode_prompt(["a photo of a ring"])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict():
        with torch.no_grad():
            return model.predict(noisy, torch.tensor([500.0]), embeds)

    expected = predict()
    lora.attach(model.denoiser, rank=2, alpha=2, targets=model.lora_targets)
    for name in (lora.CURRENT, lora.LAGGED, lora.REFERENCE):
        with lora.policy(model.denoiser, name):
            assert torch.equal(predict(), expected)
    for layer in model.denoiser.modules():
        if isinstance(layer, PackedLayer) and layer.svd_up is not None:
            layer.svd_up.data.zero_()
    assert not torch.allclose(predict(), expected)


@pytest.mark.parametrize(
    ("name", "share"),
    [slow("shapes-flux", 0.85), ("shapes-sd", 0.6)],
)
@pytest.mark.slow
def test_a_calibrated_branch_makes_trained_models_better(name, share):
    prompts = ["a photo of a red circle", "a photo of two blue squares"]
    errors = []
    for rank in (0, 8):
        model = load_model(name, dtype=torch.float32)
        embeds = model.encode_prompt(prompts * 2)
        noisy = torch.randn(
            4, *model.latent_shape((64, 64)), generator=torch.Generator().manual_seed(0)
        )
        times = torch.tensor([100.0, 350.0, 650.0, 900.0])
        with torch.no_grad():
            before = model.predict(noisy, times, embeds)
            scales = None
            if rank:
                scales = collect_input_scales(
                    model.denoiser,
                    lambda m=model, n=noisy, t=times, e=embeds: m.predict(n.roll(1, 0), t, e),
                )
            quantize_model(model.denoiser, "int4", svd_rank=rank, input_scales=scales)
            errors.append((model.predict(noisy, times, embeds) - before).norm().item())
    assert errors[1] < share * errors[0]


def test_input_scales_without_a_branch_are_refused():
    model = tiny.flux_model()
    with pytest.raises(UsageError, match=r"svd_rank=0: .* Set svd_rank"):
        quantize_model(model.denoiser, "int4", input_scales={}, min_weights=64)
