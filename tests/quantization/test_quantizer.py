"""Packed folders: quantised while loading, saved, and loaded again by stock classes, bit for bit."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SanaPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from processes import python
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign import lora
from diffalign.core.errors import UsageError
from diffalign.pipelines.registry import load_model
from diffalign.quantization.accounting import folder_bytes, report
from diffalign.quantization.apply import quantization_config, quantize_model
from diffalign.quantization.layers import PackedConv2d, PackedLayer, PackedLinear
from diffalign.quantization.moments import collect_moments
from diffalign.quantization.packed import SKIP, packable
from diffalign.quantization.quantizer import PackedConfig

PIPELINES = {
    "sd": (tiny.sd_pipeline, "unet"),
    "sdxl": (tiny.sdxl_pipeline, "unet"),
    "sd3": (tiny.sd3_pipeline, "transformer"),
    "flux": (tiny.flux_pipeline, "transformer"),
    "sana": (tiny.sana_pipeline, "transformer"),
}


def image(pipeline):
    options = {"height": 16, "width": 16}
    if "transformer" in pipeline.components:
        options["max_sequence_length"] = 16
    if isinstance(pipeline, SanaPipeline):
        options |= {"height": 32, "width": 32, "use_resolution_binning": False}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a photo of a circle",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **options,
    ).images


def load(folder, dtype=torch.float32, **configs):
    mapping = PipelineQuantizationConfig(quant_mapping=configs) if configs else None
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, quantization_config=mapping)


def small(**kwargs):
    return PackedConfig(min_weights=64, **kwargs)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A folder of a tiny FLUX pipeline with packed weights, the same before, and what it draws."""
    folder = tmp_path_factory.mktemp("flux")
    tiny.flux_pipeline().save_pretrained(folder / "plain")
    pipeline = load(folder / "plain", transformer=small(svd_rank=2))
    pipeline.save_pretrained(folder / "packed")
    return folder, image(pipeline)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"bits": 4, "svd_rank": 2}),
        (torch.bfloat16, {"bits": 8}),
    ],
)
def test_a_pipeline_is_packed_while_loading_and_reloads_bit_equal(
    tmp_path, family, dtype, settings
):
    make, part = PIPELINES[family]
    plain = make()
    plain.save_pretrained(tmp_path / "plain")
    packed = load(tmp_path / "plain", dtype, **{part: small(**settings)})
    kinds = {type(m) for m in getattr(packed, part).modules()}
    assert PackedLinear in kinds
    assert (PackedConv2d in kinds) == (part == "unet" or family == "sana")
    expected = image(packed)
    # SANA's linear attention divides by sums of what is packed
    assert np.abs(expected - image(plain)).max() < (0.4 if family == "sana" else 0.15)
    assert expected.std() > 0.01  # not all black

    packed.save_pretrained(tmp_path / "packed")
    saved = json.loads((tmp_path / "packed" / part / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "diffalign_packed"
    reloaded = load(tmp_path / "packed", dtype)
    denoiser = getattr(reloaded, part)
    assert denoiser.dtype == dtype
    assert denoiser.config.quantization_config.to_dict() == saved["quantization_config"]
    assert np.array_equal(image(reloaded), expected)
    reloaded.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "packed" / part).glob("*.safetensors"):
        assert (tmp_path / "again" / part / file.name).read_bytes() == file.read_bytes()


def test_packing_while_loading_equals_packing_in_place(flux):
    folder, expected = flux
    pipeline = tiny.flux_pipeline()
    assert quantize_model(pipeline.transformer, "int4", svd_rank=2, min_weights=64) == "int4"
    assert np.array_equal(image(pipeline), expected)
    loaded = FluxTransformer2DModel.from_pretrained(
        folder / "plain", subfolder="transformer", quantization_config=small(svd_rank=2)
    )
    theirs, ours = loaded.state_dict(), pipeline.transformer.state_dict()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    assert theirs.keys() == ours.keys()


def test_weights_are_packed_from_the_file_not_from_their_rounding(flux, tmp_path):
    """float32 weights, loaded in bfloat16: the codes are those of float32."""
    folder, _ = flux
    where = {"subfolder": "transformer", "quantization_config": small(bits=8)}
    half, full = (
        FluxTransformer2DModel.from_pretrained(folder / "plain", torch_dtype=dtype, **where)
        for dtype in (torch.bfloat16, torch.float32)
    )
    name = "transformer_blocks.0.attn.to_q"
    assert torch.equal(half.get_submodule(name).weight, full.get_submodule(name).weight)
    assert half.get_submodule(name).bias.dtype == torch.bfloat16


def test_shards_reload(flux, tmp_path):
    folder, expected = flux
    pipeline = load(folder / "packed")
    pipeline.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    assert np.array_equal(image(load(tmp_path)), expected)


def test_shards_are_packed_while_loading(flux, tmp_path):
    _, expected = flux
    tiny.flux_pipeline().save_pretrained(tmp_path, max_shard_size="15KB")
    assert np.array_equal(image(load(tmp_path, transformer=small(svd_rank=2))), expected)


def test_missing_tensors_and_files_are_named(flux, tmp_path):
    folder, _ = flux
    shutil.copytree(folder / "packed" / "transformer", tmp_path / "whole")
    file = tmp_path / "whole" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    kept = {k: v for k, v in state.items() if not k.endswith("to_q.weight_scale")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"tensors of the packed Flux.* missing.*to_q\.weight_scale"
    ):
        FluxTransformer2DModel.from_pretrained(tmp_path / "whole")

    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "whole")

    shards = load(folder / "packed").transformer
    shards.save_pretrained(tmp_path / "shards", max_shard_size="15KB")
    sorted((tmp_path / "shards").glob("*.safetensors"))[1].unlink()
    with pytest.raises(OSError, match="does not appear to have a file named"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "shards")


def test_a_later_format_and_foreign_values_are_refused(flux, tmp_path):
    folder, _ = flux
    shutil.copytree(folder / "packed" / "transformer", tmp_path / "later")
    config = json.loads((tmp_path / "later" / "config.json").read_text())
    config["quantization_config"]["format"] = 3
    (tmp_path / "later" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UsageError, match="packed format 3; this version of diffalign reads up to 2"
    ):
        FluxTransformer2DModel.from_pretrained(tmp_path / "later")
    with pytest.raises(UsageError, match="bits=5: there is no such format"):
        PackedConfig(bits=5)
    with pytest.raises(UsageError, match="disk"):
        FluxTransformer2DModel.from_pretrained(
            folder / "packed", subfolder="transformer", device_map={"": "disk"}
        )


def test_codes_of_8_and_4_bits_keep_the_format_of_the_first_release():
    assert [PackedConfig(bits=bits).format for bits in (8, 4, 3, 2)] == [1, 1, 2, 2]
    by_token = PackedConfig(8, None, activation_timesteps="token")
    assert by_token.format == PackedConfig(bits={"a": 4}).format == 2
    # the release before refuses a format by its number, if it knows all names
    assert set(by_token.to_dict()) == set(PackedConfig().to_dict())


def test_three_and_two_bits_reload_bit_equal(flux, tmp_path):
    folder, _ = flux
    packed = load(folder / "plain", transformer=small(bits=3))
    expected = image(packed)
    packed.save_pretrained(tmp_path / "three")
    assert np.array_equal(image(load(tmp_path / "three")), expected)
    model = tiny.flux_model()
    layers = packable(model.denoiser, min_weights=64)
    embeds = model.encode_prompt(["a photo of a ring"])

    def run():
        model.predict(torch.ones(1, 4, 8, 8), torch.tensor([500.0]), embeds)

    moments = collect_moments(model.denoiser, layers, run)
    quantize_model(model.denoiser, "int2", min_weights=64, moments=moments)
    expected = image(model.pipeline)
    model.pipeline.save_pretrained(tmp_path / "two")
    assert np.array_equal(image(load(tmp_path / "two")), expected)


def test_two_bits_are_not_rounded_to_nearest(flux):
    folder, _ = flux
    for refused in (
        lambda: quantize_model(tiny.flux_model().denoiser, "int2", min_weights=64),
        lambda: quantization_config("int2", device="cpu"),
        lambda: load(folder / "plain", transformer=small(bits=2)),
    ):
        with pytest.raises(UsageError, match="bits=2: rounding to nearest"):
            refused()


@pytest.mark.slow
def test_without_our_import_diffusers_names_the_method(flux):
    folder, _ = flux
    told = python("stock_transformer", folder / "packed" / "transformer")
    assert told.returncode == 1
    assert "Unknown quantization type, got diffalign_packed" in told.stderr


def test_the_package_itself_loads_nothing():
    code = "import sys, diffalign.quantization.backends as b; assert 'int4' in b.BACKENDS; "
    code += "assert not {'torch', 'diffusers', 'torchao'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stock_flux_loras_load_onto_four_bits(flux, tmp_path):
    """The loader reads a layer's size off its weight, of which packed ones have half the columns."""
    folder, expected = flux
    trained = tiny.flux_model()
    parameters = lora.attach(
        trained.denoiser, rank=4, alpha=4.0, targets=[*trained.lora_targets, "proj_mlp"]
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    lora.export_lora(trained.denoiser, trained.pipeline, tmp_path)
    packed, plain = load(folder / "packed"), load(folder / "packed")
    for name, layer in list(plain.transformer.named_modules()):
        if isinstance(layer, PackedLayer):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight, linear.bias = nn.Parameter(layer.dequantize()), layer.bias
            parent, _, attribute = name.rpartition(".")
            setattr(plain.transformer.get_submodule(parent), attribute, linear)
    drawn = []
    for pipeline in (packed, plain):
        lora.load_lora(pipeline, str(tmp_path))
        drawn.append(image(pipeline))
    assert np.abs(drawn[0] - expected).max() > 0.01
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-4)
    packed.unload_lora_weights()
    assert np.array_equal(image(packed), expected)


def test_what_stock_models_refuse_once_quantised(flux, tmp_path):
    """Casts raise, and so does `save_lora_adapter`, which casts; our export does not."""
    folder, expected = flux
    pipeline = load(folder / "packed")
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipeline.transformer.to(torch.bfloat16)
    lora.attach(pipeline.transformer, rank=2, alpha=2, targets=["attn.to_q"])
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipeline.transformer.save_lora_adapter(tmp_path / "theirs")
    assert lora.export_lora(pipeline.transformer, pipeline, tmp_path / "ours").is_file()
    assert np.array_equal(image(pipeline), expected)  # a fresh adapter, and the branch is still on


def test_modules_that_a_class_wants_in_float32_keep_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", ["ff"])
    made = tiny.flux_pipeline().transformer
    made.save_pretrained(tmp_path / "plain")
    quantize_model(made, "int8", min_weights=64)
    loaded = FluxTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=small(bits=8), torch_dtype=torch.bfloat16
    )
    loaded.save_pretrained(tmp_path / "packed")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    for model in (made, loaded, again):
        assert type(model.transformer_blocks[0].ff.net[2]) is nn.Linear
        assert type(model.transformer_blocks[0].ff_context.net[2]) is PackedLinear
    assert again.transformer_blocks[0].ff.net[2].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["shapes-flux", "shapes-sd"])
def test_the_packaged_models_shrink_and_hardly_change(name, tmp_path):
    model = load_model(name)
    embeds = model.encode_prompt(["a photo of a red circle", "a photo of two blue squares"])
    latents = torch.randn(
        2, *model.latent_shape((64, 64)), generator=torch.Generator().manual_seed(0)
    )
    times = torch.tensor([250.0, 750.0])

    def predict():
        with torch.no_grad():
            return model.predict(latents.bfloat16(), times, embeds).float()

    before = predict()
    quantize_model(model.denoiser, "int8")
    assert (predict() - before).norm() < 0.02 * before.norm()
    assert report(model.denoiser).ratio > 1.7
    model.denoiser.save_pretrained(tmp_path)
    assert folder_bytes(tmp_path) == pytest.approx(report(model.denoiser).bytes, rel=0.02)
    again = type(model.denoiser).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    state = model.denoiser.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_skipped_layers_are_written_down(flux):
    folder, _ = flux
    config = json.loads((folder / "packed" / "transformer" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "diffalign_packed",
        "format": 1,
        "bits": 4,
        "group_size": 64,
        "svd_rank": 2,
        "activation_timesteps": [],
        "skip": list(SKIP),
        "min_weights": 64,
    }
