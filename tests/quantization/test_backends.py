"""Which backend is chosen where, and that torchao's and ours leave what from_pretrained reloads."""

import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from diffalign.core.errors import UsageError
from diffalign.quantization import backends
from diffalign.quantization.accounting import report
from diffalign.quantization.apply import quantization_config, quantize_model, quantize_pipeline
from diffalign.quantization.backends import BACKENDS, missing_for, resolve
from diffalign.quantization.layers import PackedLinear
from diffalign.shapes import CHECKPOINTS


@pytest.fixture
def machine(monkeypatch):
    """A device of some compute capability, with versions of libraries."""

    def be(capability=(-1, -1), **versions):
        monkeypatch.setattr(backends, "_capability", lambda device: capability)
        known = {"torchao": (0, 18), "bitsandbytes": (), "gguf": (), "sdnq": (), **versions}
        monkeypatch.setattr(backends, "_version", lambda library: known[library])

    return be


@pytest.mark.parametrize(
    ("capability", "model", "training", "expected"),
    [
        ((9, 0), FluxTransformer2DModel, False, "torchao-fp8"),
        ((8, 9), FluxTransformer2DModel, False, "torchao-fp8"),
        ((8, 0), FluxTransformer2DModel, False, "torchao-int8"),
        ((7, 5), FluxTransformer2DModel, False, "int8"),
        ((9, 0), FluxTransformer2DModel, True, "int8"),
        ((9, 0), UNet2DConditionModel, False, "int8"),
        ((9, 0), nn.Linear, False, "int8"),
        ((-1, -1), FluxTransformer2DModel, False, "int8"),
    ],
)
def test_auto_chooses_by_device_model_and_purpose(machine, capability, model, training, expected):
    machine(capability)
    assert resolve("auto", device="cuda", model=model, training=training) == expected
    machine(capability, torchao=())
    assert resolve("auto", device="cuda", model=model, training=training) == "int8"


@pytest.mark.parametrize(
    ("name", "capability", "versions", "message"),
    [
        ("torchao-int8", (9, 0), {"torchao": ()}, r"pip install 'torchao>=0\.16'. `int8` works"),
        ("torchao-int8", (9, 0), {"torchao": (0, 15)}, r"torchao-int8 needs torchao>=0\.16"),
        ("torchao-fp8", (8, 6), {}, r"capability 8\.9, this is one of 8\.6"),
        ("torchao-fp8", (-1, -1), {}, r"this is no CUDA device \(cpu\)"),
        ("bnb-nf4", (9, 0), {}, r"bitsandbytes>=0\.43\.3'. `int4` works"),
        ("bnb-nf4", (-1, -1), {"bitsandbytes": (0, 49)}, r"bnb-nf4 needs CUDA"),
        ("torchao-nvfp4", (9, 0), {}, r"capability 10\.0, this is one of 9\.0. `int4` works"),
        ("torchao-mxfp8", (-1, -1), {}, r"capability 10\.0, this is no CUDA device"),
        ("sdnq-uint4", (9, 0), {}, r"pip install 'sdnq>=0\.2\.2'. `int4` works without it"),
        ("gguf", (9, 0), {}, r"gguf needs gguf>=0\.10: pip install"),
        ("int5", (9, 0), {}, "did you mean 'int"),
        ("nonsense", (9, 0), {}, "choose from auto, int8, int4"),
    ],
)
def test_what_cannot_run_is_refused_with_a_way_out(machine, name, capability, versions, message):
    machine(capability, **versions)
    with pytest.raises(UsageError, match=message):
        resolve(name, device="cpu")


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if not b.trains])
def test_backends_that_round_activations_do_not_train(machine, name):
    machine((10, 0))
    with pytest.raises(UsageError, match="no gradient passes through"):
        resolve(name, device="cuda", training=True)


def layer(model):
    return model.transformer_blocks[0].attn.to_q


@pytest.mark.parametrize("name", ["torchao-int8", "torchao-int8wo", "torchao-fp8wo"])
def test_torchao_in_place_reloads_bit_equal_and_is_weighed_whole(name, tmp_path):
    """get_memory_footprint of diffusers counts such a weight as if it had 16 bits."""
    model = tiny.flux_model().denoiser.to(torch.bfloat16)
    plain = report(model)
    assert quantize_model(model, name, min_weights=64) == name
    weight = layer(model).weight
    assert type(weight) is not torch.Tensor
    rows, columns = weight.shape
    assert rows * columns < tiny.tensor_bytes(weight) <= rows * (columns + 8)
    small = report(model)
    assert small.weights == plain.weights
    assert small.bytes < plain.bytes == plain.bf16_bytes
    assert small.quantised_fraction > 0.5

    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(layer(again).weight.dequantize(), weight.dequantize())
    inputs = tiny.flux_model().random_inputs(2, (16, 16))
    latents, times, embeds = (x.to(torch.bfloat16) for x in inputs)
    outputs = []
    for denoiser in (model, again):
        driver = tiny.flux_model()
        driver.pipeline.transformer = denoiser
        with torch.no_grad():
            outputs.append(driver.forward(latents, times, embeds))
    assert torch.equal(*outputs)
    assert report(again).bytes == small.bytes
    kept = [
        m
        for m in (again.x_embedder, again.proj_out)
        if tiny.tensor_bytes(m.weight) != 2 * m.weight.numel()
    ]
    assert not kept


def test_torchao_while_loading_skips_what_we_skip(tmp_path):
    tiny.flux_pipeline().save_pretrained(tmp_path)
    config = quantization_config("torchao-int8wo", device="cpu")
    model = FluxTransformer2DModel.from_pretrained(
        tmp_path, subfolder="transformer", quantization_config=config, torch_dtype=torch.bfloat16
    )
    assert type(layer(model).weight.data) is not torch.Tensor
    block = model.single_transformer_blocks[0]
    assert type(block.proj_out.weight.data) is not torch.Tensor  # a block's is not the model's
    for kept in (model.proj_out, model.x_embedder):
        assert type(kept.weight) is nn.Parameter
        assert kept.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "module", "ratio"),
    [
        ("quanto-int8", "optimum.quanto", 1.6),
        ("quanto-int4", "optimum.quanto", 2.2),
        ("sdnq-int8", "sdnq", 1.5),
        ("sdnq-uint4", "sdnq", 2.0),
    ],
)
def test_other_libraries_quantise_while_loading_and_reload(name, module, ratio, tmp_path):
    pytest.importorskip(module)
    config = quantization_config(name, device="cpu")
    options = {"torch_dtype": torch.bfloat16}
    model = FluxTransformer2DModel.from_pretrained(
        CHECKPOINTS / "shapes-flux", subfolder="transformer", quantization_config=config, **options
    )
    plain = FluxTransformer2DModel.from_pretrained(
        CHECKPOINTS / "shapes-flux", subfolder="transformer", **options
    )
    small = report(model)
    # quanto keeps two scales for activations in each layer
    assert small.weights == pytest.approx(report(plain).weights, rel=1e-4)
    assert small.ratio > ratio
    assert type(model.x_embedder) is nn.Linear
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert missing_for(saved, device="cpu") is None
    again = FluxTransformer2DModel.from_pretrained(tmp_path, **options)
    assert report(again).bytes == small.bytes


def test_what_is_written_elsewhere_is_said(machine):
    machine(gguf=(0, 19), sdnq=())
    with pytest.raises(UsageError, match="gguf: files of this format are written by other"):
        quantization_config("gguf", device="cpu")
    with pytest.raises(UsageError, match="gguf: a loaded model cannot be quantised"):
        quantize_model(tiny.flux_model().denoiser, "gguf")
    assert "pip install 'sdnq" in missing_for({"quant_method": "sdnq"}, device="cpu")


def test_text_encoders_are_packed_and_reload(tmp_path):
    pipeline = tiny.flux_pipeline()
    done = quantize_pipeline(pipeline, "int8", components=["text_encoder_2"], min_weights=64)
    assert done == {"text_encoder_2": "int8"}
    encoder = pipeline.text_encoder_2
    assert any(isinstance(m, PackedLinear) for m in encoder.modules())
    ids = torch.arange(4)[None]
    expected = encoder(ids)[0]
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert torch.equal(again.text_encoder_2(ids)[0], expected)


def test_twice_is_refused():
    model = tiny.flux_model().denoiser
    quantize_model(model, "int8", min_weights=64)
    with pytest.raises(UsageError, match="is quantised already"):
        quantize_model(model, "int4", min_weights=64)
