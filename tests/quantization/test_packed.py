"""Packed weights: exact where they can be, never worse than plain rounding, layers equal to torch's own on the unpacked
weight, gradients and LoRA included; and what models weigh."""

import copy

import pytest
import tiny
import tiny_llm
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from test_published import build
from torch import nn

from diffalign import lora
from diffalign.core.errors import UsageError
from diffalign.quantization import codes
from diffalign.quantization.accounting import folder_bytes, report
from diffalign.quantization.layers import PackedConv2d, PackedLayer, PackedLinear, PackSpec
from diffalign.quantization.packed import pack_model, packable

SHAPES = [(8, 64), (6, 65), (3, 5, 3, 3), (4, 130), (5, 1)]


def unpacked(weight, bits, group_size):
    packed, scales = codes.pack(weight, bits=bits, group_size=group_size)
    return codes.unpack(
        packed, scales, shape=weight.shape, bits=bits, group_size=group_size, dtype=weight.dtype
    )


def packed_layer(layer, **kwargs):
    module = nn.Sequential(copy.deepcopy(layer))
    pack_model(module, spec=PackSpec(**kwargs), min_weights=0)
    return module[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [64, 7, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_codes_can_say_comes_back_exactly(bits, group_size, shape):
    """Any codes times scales of either sign, each group with a code of largest size in it."""
    generator = torch.Generator().manual_seed(0)
    lowest = 2 ** (bits - 1)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    values = torch.randint(-lowest, lowest, (rows, columns), generator=generator)
    group = group_size or columns
    values[:, ::group] = -lowest
    values[1:, ::group] = 1 - lowest  # rows after the first reach one code less far
    values[1:] = values[1:].clamp(1 - lowest, lowest - 1)
    groups = -(-columns // group)
    scales = torch.randn(rows, groups, generator=generator).bfloat16().float()
    weight = (values * scales.repeat_interleave(group, 1)[:, :columns]).view(shape)
    assert torch.equal(unpacked(weight, bits, group_size), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_again_changes_nothing(bits, shape):
    once = unpacked(torch.randn(shape, generator=torch.Generator().manual_seed(1)), bits, 64)
    assert torch.equal(unpacked(once, bits, 64), once)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_group_is_rounded_worse_than_by_its_largest_weight(bits):
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(2))
    most = 2 ** (bits - 1) - 1
    groups = weight.view(256, 3, 64)
    scale = (groups.abs().amax(-1, keepdim=True) / most).bfloat16().float()
    plain = (groups / scale).round().clamp(-most - 1, most) * scale
    ours = unpacked(weight, bits, 64).view_as(groups)
    worst = (plain - groups).square().sum(-1)
    errors = (ours - groups).square().sum(-1)
    assert (errors <= worst * (1 + 1e-5)).all()
    assert errors.sum() < {4: 0.8, 8: 0.99}[bits] * worst.sum()


@pytest.mark.parametrize("size", [1e-37, 1e-12, 1.0, 1e12, 1e37])
def test_scales_neither_overflow_nor_underflow(size):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    relative = (unpacked(weight * size, 4, 64) / size - weight).norm() / weight.norm()
    assert relative < 0.12


def test_zeros_and_float16_weights():
    assert torch.equal(unpacked(torch.zeros(3, 70), 4, 64), torch.zeros(3, 70))
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4)).half() * 1e-4
    assert ((unpacked(weight, 8, 64) - weight).norm() / weight.norm()) < 0.01


@pytest.mark.parametrize(
    ("bits", "group_size", "each"),
    [(4, 64, 4.25), (8, 64, 8.25), (4, 32, 4.5), (3, 64, 3.25), (2, 64, 2.25)],
)
def test_bytes_are_those_of_the_bits_and_the_scales(bits, group_size, each):
    layer = packed_layer(nn.Linear(640, 320, bias=False), bits=bits, group_size=group_size)
    assert sum(tiny.tensor_bytes(p) for p in layer.parameters()) == 640 * 320 * each / 8
    assert report(layer).bits_per_weight == each


CONVOLUTIONS = [
    {"padding": 1},
    {"padding": 1, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (0, 1), "bias": False},
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_convolutions_equal_torchs_on_the_unpacked_weight(bits, settings):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, **settings)
    packed = packed_layer(plain, bits=bits)
    plain.weight.data = packed.dequantize()
    same_forward_and_gradients(packed, plain, torch.randn(2, 6, 9, 8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 37)])
def test_linear_layers_equal_torchs_on_the_unpacked_weight(bits, bias, shape):
    torch.manual_seed(0)
    plain = nn.Linear(37, 11, bias=bias)
    packed = packed_layer(plain, bits=bits, group_size=16)
    plain.weight.data = packed.dequantize()
    same_forward_and_gradients(packed, plain, torch.randn(shape))


def same_forward_and_gradients(packed, plain, value):
    grads = []
    outs = []
    for layer in (packed, plain):
        given = value.clone().requires_grad_()
        outs.append(layer(given))
        outs[-1].square().sum().backward()
        grads.append((given.grad, None if layer.bias is None else layer.bias.grad))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(packed(value), plain(value))


def test_no_unpacked_weight_is_kept_for_the_backward():
    layer = packed_layer(nn.Linear(256, 256), bits=4, svd_rank=2)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(3, 256, requires_grad=True))
    assert max(t.numel() * t.element_size() for t in kept) == 256 * 256 // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_follow_the_input_and_scales_stay(dtype):
    torch.manual_seed(0)
    layer = packed_layer(nn.Linear(64, 16), bits=4, svd_rank=2)
    scales, value = layer.weight_scale.clone(), torch.randn(3, 64)
    expected = layer(value)
    layer.to(dtype)
    assert torch.equal(layer.weight_scale, scales)
    assert layer.bias.dtype == layer.svd_up.dtype == dtype
    out = layer(value.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


def test_autocast_computes_in_bfloat16():
    torch.manual_seed(0)
    layer = packed_layer(nn.Conv2d(4, 8, 3), bits=8)
    value = torch.randn(1, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(value)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert value.grad.dtype == torch.float32


def test_layers_compile_without_a_break():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(64, 16))
    pack_model(model, min_weights=0)
    value = torch.randn(2, 3, 8, 8, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model(value).square().sum().backward()
    expected, value.grad = value.grad, None
    compiled(value).square().sum().backward()
    torch.testing.assert_close(value.grad, expected)


def families():
    return {**tiny.MODELS, **tiny.UNETS}


def predict(model):
    shape = model.latent_shape(model.default_size)
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    embeds = model.encode_prompt(["a photo of a circle", "a photo of a ring"])
    return model.predict(noisy, torch.tensor([300.0, 800.0]), embeds)


def unpack_model(model):
    """The same model with ordinary layers that hold the unpacked weights."""
    plain = families()[model.family]()
    for name, layer in model.denoiser.named_modules():
        if isinstance(layer, PackedLayer):
            plain.denoiser.get_submodule(name).weight.data = layer.dequantize()
    return plain


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 130])
def test_planes_come_back_exactly(bits, columns):
    generator = torch.Generator().manual_seed(columns)
    lowest = 2 ** (bits - 1)
    values = torch.randint(-lowest, lowest, (3, columns), generator=generator).to(torch.int8)
    packed = codes.join(values, bits=bits)
    assert packed.shape == codes.packed_shape(3, columns, bits=bits)
    assert torch.equal(codes.split(packed, columns, bits=bits), values)
    if bits == 4:  # as the first release wrote them
        half = (columns + 1) // 2
        high = nn.functional.pad(values[:, half:], (0, columns % 2))
        assert torch.equal(packed, (values[:, :half] & 15) | (high << 4))


def test_every_byte_is_read():
    whole = torch.arange(-128, 128).to(torch.int8)[None]
    for bits, columns in ((4, 512), (2, 1024)):
        again = codes.join(codes.split(whole, columns, bits=bits), bits=bits)
        assert torch.equal(again, whole)


@pytest.mark.parametrize(
    ("family", "bits"),
    [("sd3", 4), ("flux", 4), ("sana", 4), ("sd", 4), ("sdxl", 4), ("flux", 3), ("sd", 2)]
    + [(family, 4) for family in tiny_llm.MODELS],
)
def test_lora_trains_over_packed_weights_as_over_the_unpacked(family, bits):
    gradients, outs = [], []
    packed = families()[family]()
    names = pack_model(packed.denoiser, spec=PackSpec(bits), min_weights=64)
    assert any(n.endswith("to_q") for n in names)
    for model in (packed, unpack_model(packed)):
        with torch.no_grad():
            base = predict(model)
        parameters = lora.attach(model.denoiser, rank=4, alpha=12.0, targets=model.lora_targets)
        with torch.no_grad():
            assert torch.equal(predict(model), base)
            torch.manual_seed(1)
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        outs.append(predict(model))
        outs[-1].square().mean().backward()
        gradients.append([p.grad for p in parameters])
        with torch.no_grad(), lora.policy(model.denoiser, lora.REFERENCE):
            assert torch.equal(predict(model), base)
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_convolutions_carry_adapters(bits):
    packed = tiny.sd_model()
    pack_model(packed.denoiser, spec=PackSpec(bits), min_weights=64)
    outs = []
    for model in (packed, unpack_model(packed)):
        torch.manual_seed(0)
        targets = ["conv1", "conv_shortcut"]
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model.denoiser.add_adapter(config)
        with torch.no_grad():
            outs.append(predict(model))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_reads_the_unpacked_weight(bits):
    packed = tiny.flux_model()
    pack_model(packed.denoiser, spec=PackSpec(bits), min_weights=64)
    outs = []
    for model in (packed, unpack_model(packed)):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules=["attn.to_q"], use_dora=True, init_lora_weights=False
        )
        model.denoiser.add_adapter(config)
        with torch.no_grad():
            outs.append(predict(model))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_is_not_merged_into_codes(bits):
    model = tiny.flux_model()
    pack_model(model.denoiser, spec=PackSpec(bits), min_weights=64)
    lora.attach(model.denoiser, rank=2, alpha=2, targets=model.lora_targets)
    with (
        pytest.raises(UsageError, match="cannot be merged into PackedLinear"),
        lora.merged(model.denoiser, lora.CURRENT),
    ):
        pass
    with pytest.raises(RuntimeError):
        model.denoiser.fuse_lora()


def test_first_and_last_layers_keep_their_weights_by_full_name():
    flux, unet = build("flux").denoiser, build("sd").denoiser
    names = packable(flux)
    assert "single_transformer_blocks.0.proj_out" in names
    assert "transformer_blocks.0.norm1.linear" in names
    assert not {"proj_out", "x_embedder", "time_text_embed.text_embedder.linear_1"} & set(names)
    assert "down_blocks.0.attentions.0.proj_out" in packable(unet)
    assert not {"conv_in", "conv_out", "time_embedding.linear_1"} & set(packable(unet))
    assert "up_blocks.0.resnets.0.conv1" not in packable(unet, skip=["up_blocks.*.conv1"])


def test_small_layers_and_subclasses_keep_their_weights():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"small": nn.Linear(8, 8), "own": Own(64, 64), "large": nn.Linear(64, 64)}
    )
    assert pack_model(model) == ["large"]
    assert type(model["own"]) is Own
    attention = nn.MultiheadAttention(64, 2)  # its own functions read its projections' weights
    with pytest.raises(UsageError, match="nothing to quantise"):
        pack_model(attention, min_weights=0)


def test_what_cannot_be_packed_is_named():
    model = tiny.flux_model()
    with pytest.raises(UsageError, match="bits=5: there is no such format. Set 8, 4, 3 or 2"):
        PackSpec(5)
    with pytest.raises(UsageError, match="group_size"):
        PackSpec(group_size=0)
    with pytest.raises(UsageError, match="svd_rank"):
        PackSpec(svd_rank=-1)
    model.denoiser.transformer_blocks[0].attn.to_k.weight.data[0, 0] = torch.inf
    with pytest.raises(UsageError, match=r"transformer_blocks\.0\.attn\.to_k .* not finite"):
        pack_model(model.denoiser, min_weights=0)
    model = tiny.flux_model()
    lora.attach(model.denoiser, rank=2, alpha=2, targets=model.lora_targets)
    with pytest.raises(UsageError, match="before it gets adapters"):
        pack_model(model.denoiser, min_weights=0)


# with every number at 4.25 bits it would be 3.76; SD3.5-medium holds a position table of 227 million numbers,
# and 36 of SANA's 1604 million are where time enters
@pytest.mark.parametrize(
    ("family", "int4", "int8"),
    [
        ("sd", 3.73, 1.93),
        ("sdxl", 3.73, 1.93),
        ("sd3", 2.98, 1.78),
        ("flux", 3.73, 1.93),
        ("sana", 3.54, 1.90),
    ],
)
def test_published_models_become_so_many_times_smaller(family, int4, int8):
    for bits, ratio in ((4, int4), (8, int8)):
        denoiser = build(family).denoiser
        before = report(denoiser)
        pack_model(denoiser, spec=PackSpec(bits))
        after = report(denoiser)
        assert before.bytes == before.bf16_bytes == after.bf16_bytes
        assert before.weights == after.weights
        assert after.ratio == pytest.approx(ratio, abs=0.01)
        assert after.quantised_fraction > {"sd3": 0.9, "sana": 0.97}.get(family, 0.996)
        assert all(p.is_meta for p in denoiser.parameters())


@pytest.mark.parametrize(("bits", "gigabytes"), [(3, 4.9), (2, 3.4)])
def test_flux_in_three_and_two_bits(bits, gigabytes):
    denoiser = build("flux").denoiser
    pack_model(denoiser, spec=PackSpec(bits))
    assert report(denoiser).bytes / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_kinds_add_up_and_are_shown():
    denoiser = build("sd").denoiser
    pack_model(denoiser)
    found = report(denoiser)
    conv = sum(m.weight.numel() for m in build("sd").denoiser.modules() if type(m) is nn.Conv2d)
    assert found.kinds["conv"].quantised == conv - 320 * 4 * 9 * 2
    assert found.bytes == sum(k.bytes for k in found.kinds.values())
    assert "3.73 times smaller" in str(found)
    assert [line.split()[0] for line in str(found).splitlines()[1:5]] == [
        "linear",
        "conv",
        "other",
        "all",
    ]


def test_shared_tensors_are_counted_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    assert report(model).bytes == 8 * 8 * 4
    whole = torch.zeros(16)
    model = nn.Module()
    model.first, model.second = nn.Parameter(whole[:8]), nn.Parameter(whole[8:])
    assert report(model).bytes == 64


def test_inner_tensors_of_torchao_are_counted_where_diffusers_counts_16_bits():
    torchao = pytest.importorskip("torchao.quantization")
    denoiser = tiny.flux_model().denoiser.bfloat16()
    denoiser.transformer_blocks[0].ff = nn.Linear(512, 512, bias=False).bfloat16()
    torchao.quantize_(denoiser, torchao.Int8WeightOnlyConfig())
    weight = denoiser.transformer_blocks[0].ff.weight
    assert 512 * 512 + 512 * 2 <= tiny.tensor_bytes(weight) < 1.02 * 512 * 512
    assert denoiser.get_memory_footprint() > 1.6 * report(denoiser).bytes
    assert report(denoiser).quantised_fraction > 0.95


def test_a_folder_weighs_what_its_model_does(tmp_path):
    model = nn.Sequential(nn.Linear(1024, 512), nn.Conv2d(64, 128, 3))
    pack_model(model)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert folder_bytes(tmp_path) == pytest.approx(report(model).bytes, rel=0.01)


def test_copies_and_prints():
    layer = packed_layer(nn.Linear(64, 16), bits=4, svd_rank=2)
    value = torch.randn(2, 64)
    assert torch.equal(copy.deepcopy(layer)(value), layer(value))
    assert isinstance(layer, PackedLinear)
    assert "in_features=64, out_features=16, bias=True, bits=4, group_size=64, svd_rank=2" in str(
        layer
    )
    conv = packed_layer(nn.Conv2d(4, 4, 3, groups=4), bits=4, svd_rank=2)
    assert isinstance(conv, PackedConv2d)
    assert conv.svd_up is None  # a branch of grouped convolutions would be no smaller than they are
