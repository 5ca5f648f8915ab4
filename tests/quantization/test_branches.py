"""A low-rank branch beside torchao's weights: what it mends, and that folder and reload keep it."""

import json
from itertools import pairwise

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import diffalign
from diffalign import lora
from diffalign.core.errors import UserError
from diffalign.quantization.accounting import report
from diffalign.quantization.apply import quantization_config, quantize_model
from diffalign.quantization.branches import BranchLinear

BACKENDS = ("torchao-int8wo", "torchao-fp8wo")


def linear(rows=48, columns=64, dtype=torch.bfloat16):
    """With a few large directions, which is what a branch is for."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows).to(dtype)
    with torch.no_grad():
        layer.weight += 3 * torch.randn(rows, 2) @ torch.randn(2, columns)
    return layer


def quantised(layer, backend, rank):
    """A layer as it is in a model."""
    model = FluxTransformer2DModel(
        num_layers=0, num_single_layers=0, in_channels=4, attention_head_dim=16,
        num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    model.extra = layer
    quantize_model(model, backend, svd_rank=rank, min_weights=1000)
    return model.extra


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_branch_takes_what_is_large(backend):
    """The error falls with the rank, rank 0 is torchao alone, and full rank is the weight in its own dtype."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = linear().float()(x.float())
    errors = []
    for rank in (0, 2, 16, 48):
        layer = quantised(linear(), backend, rank)
        assert isinstance(layer, BranchLinear) == (rank > 0)
        with torch.no_grad():
            errors.append(float((layer(x).float() - exact).norm() / exact.norm()))
    rounding = float((linear()(x).float() - exact).norm() / exact.norm())
    assert errors[1] < 0.6 * errors[0]
    assert all(b <= a * 1.1 + rounding for a, b in pairwise(errors))
    assert errors[-1] < 2 * rounding + 2e-3


def test_the_branch_is_fitted_to_the_inputs():
    scale = torch.ones(64)
    scale[:4] = 30
    weight = linear().weight.detach().clone()
    errors = []
    for known in (None, scale):
        layer = BranchLinear(linear(), 4)
        layer.split(known)
        assert (layer.svd_up.shape, layer.svd_down.shape) == ((48, 4), (4, 64))
        total = layer.weight.float() + layer.svd_up.float() @ layer.svd_down.float()
        torch.testing.assert_close(total, weight.float(), rtol=0, atol=0.05)
        errors.append(float(layer.weight.float()[:, :4].norm()))
    assert errors[1] < errors[0]  # less is left to round where inputs are large


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    sizes = {"height": 16, "width": 16, "max_sequence_length": 16, "num_inference_steps": 2}
    return pipeline("a circle", **sizes, **options).images


@pytest.fixture(scope="module", params=BACKENDS)
def folder(request, tmp_path_factory):
    """Of a pipeline with a branch, with what it draws and weighs."""
    folder = tmp_path_factory.mktemp("branch")
    pipeline = tiny.flux_pipeline()
    pipeline.to(torch.bfloat16)
    quantize_model(pipeline.transformer, request.param, svd_rank=2, min_weights=64)
    pipeline.save_pretrained(folder)
    return folder, image(pipeline), report(pipeline.transformer)


def test_a_folder_keeps_the_branch(folder, tmp_path):
    place, expected, weight = folder
    config = json.loads((place / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "diffalign_torchao"
    assert config["quantization_config"]["svd_rank"] == 2
    for load in (diffalign.load, DiffusionPipeline.from_pretrained):
        again = load(place, torch_dtype=torch.bfloat16)
        layer = again.transformer.transformer_blocks[0].attn.to_q
        assert type(layer) is BranchLinear
        assert type(layer.weight.data) is not torch.Tensor
        assert torch.equal(image(again), expected)
        assert type(again.transformer.x_embedder) is nn.Linear
    found = report(again.transformer)
    assert (found.bytes, found.weights) == (weight.bytes, weight.weights)
    again.save_pretrained(tmp_path)
    assert torch.equal(image(diffalign.load(tmp_path, torch_dtype=torch.bfloat16)), expected)


def test_the_branchs_bytes_count_and_its_numbers_do_not(folder):
    _, _, weight = folder
    plain = tiny.flux_pipeline().transformer.to(torch.bfloat16)
    before = report(plain)
    quantize_model(plain, "torchao-int8wo", min_weights=64)
    assert weight.weights == before.weights
    assert report(plain).bytes < weight.bytes < before.bytes


def test_adapters_train_over_it(folder):
    place, expected, _ = folder
    pipeline = diffalign.load(place, torch_dtype=torch.bfloat16)
    parameters = lora.attach(pipeline.transformer, rank=2, alpha=2, targets=["attn.to_q"])
    assert torch.equal(image(pipeline), expected)  # a fresh adapter, and the branch is still on
    driver = tiny.flux_model()
    driver.pipeline.transformer = pipeline.transformer
    latents, times, embeds = driver.random_inputs(1, (16, 16))
    driver.forward(latents, times, embeds).float().square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)


def test_a_folder_without_its_branch_is_refused(folder, tmp_path):
    place, _, _ = folder
    pipeline = diffalign.load(place, torch_dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    names = json.loads(metadata["tensor_names"])
    kept = [n for n in names if not n.endswith("svd_up")]
    metadata = {
        **{k: v for k, v in metadata.items() if not k.endswith("svd_up")},
        "tensor_names": json.dumps(kept),
    }
    state = {k: v for k, v in load_file(file).items() if not k.endswith("svd_up")}
    save_file(state, file, metadata)
    with pytest.raises(UserError, match=r"tensors of the quantised FluxTransf.*svd_up: the folder"):
        diffalign.load(tmp_path, torch_dtype=torch.bfloat16)


def test_what_takes_no_branch_says_so():
    model = tiny.flux_model().denoiser
    with pytest.raises(UserError, match="works with int8, int4, int3, .*torchao-int8wo"):
        quantize_model(model, "torchao-int8", svd_rank=2, min_weights=64)
    with pytest.raises(UserError, match="svd_rank for a loaded denoiser"):
        quantization_config("torchao-int8wo", device="cpu", svd_rank=2)
    with pytest.raises(UserError, match="neither group_size nor svd_rank"):
        quantize_model(tiny.flux_pipeline().text_encoder_2, "torchao-int8wo", svd_rank=2)
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_k.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"attn\.to_k cannot be quantised: its weights are not fin"):
        quantize_model(model, "torchao-int8wo", svd_rank=2, min_weights=64)
