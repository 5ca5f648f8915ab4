"""LoRA files of other programs: the same update on the model, whatever the keys."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as conversions
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import cli, lora
from diffalign.core.errors import UsageError
from diffalign.lora import formats as lora_formats
from diffalign.lora import names as lora_names

RANK, ALPHA = 4, 12.0
NORMS = ("norm1.linear", "norm1_context.linear")
ALL = {
    "sd3": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "flux": ("ff.net.0.proj", "ff.net.2", "proj_mlp", "0.proj_out", "norm.linear"),
    "z_image": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
    "qwen_image": ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.2", "img_in", "txt_mod.1"),
    "flux2": (
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "single_stream_modulation.linear",
    ),
}
THEIRS = {
    ("flux2", "comfyui"): conversions._convert_non_diffusers_flux2_lora_to_diffusers,
    ("z_image", "comfyui"): conversions._convert_non_diffusers_z_image_lora_to_diffusers,
    ("z_image", "kohya"): conversions._convert_non_diffusers_z_image_lora_to_diffusers,
    ("qwen_image", "comfyui"): conversions._convert_non_diffusers_qwen_lora_to_diffusers,
    ("qwen_image", "kohya"): conversions._convert_non_diffusers_qwen_lora_to_diffusers,
    ("flux2", "kohya"): conversions._convert_kohya_flux2_lora_to_diffusers,
}
ALL["sd3"] += NORMS
ALL["flux"] += NORMS
UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv")


def trained(family, *, every=True):
    """A pipeline with a perturbed LoRA on attention, or on every matrix of its blocks."""
    model = tiny.MODELS[family]()
    targets = [*model.lora_targets]
    if every:
        targets += ALL[family]
    return perturbed(model, targets)


def perturbed(model, targets):
    parameters = lora.attach(model.denoiser, rank=RANK, alpha=ALPHA, targets=targets)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def exported(model, folder):
    return lora.export_lora(model.denoiser, model.pipeline, folder)


def deltas(file):
    """The update of every module, scale included."""
    (layers,) = lora_formats.read(file).parts.values()
    return {name: layer.scale * layer.up @ layer.down for name, layer in layers.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_there_and_back(tmp_path, family, every, to):
    model = trained(family, every=every)
    original = exported(model, tmp_path / "a")
    expected = deltas(original)
    for (
        name,
        layer,
    ) in model.denoiser.named_modules():  # and the file holds what the model has learnt
        if name in expected:
            torch.testing.assert_close(layer.get_delta_weight(lora.CURRENT), expected[name])
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    lora_formats.write(lora_formats.read(original), there, to=to, family=family)
    assert_same(deltas(there), expected)
    lora_formats.write(lora_formats.read(there), back, to="diffusers")
    assert_same(deltas(back), expected)
    before, after = load_file(original), load_file(back)
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key])


# diffusers' SD3 loader takes no tensor of alpha, so a file for ComfyUI is none for it
@pytest.mark.parametrize(
    ("family", "to"), [("sd3", "diffusers"), ("flux", "diffusers"), ("flux", "comfyui")]
)
def test_a_stock_pipeline_draws_with_a_converted_file(tmp_path, family, to):
    model = trained(family)
    original = exported(model, tmp_path)
    converted = tmp_path / "converted.safetensors"
    lora_formats.write(lora_formats.read(original), converted, to=to)
    pipelines = []
    for file in (original, converted):
        pipeline = tiny.MODELS[family]().pipeline
        pipeline.load_lora_weights(file)
        (adapter,) = pipeline.transformer.peft_config.values()
        assert adapter.lora_alpha == RANK
        pipelines.append(pipeline.transformer)
    states = [p.state_dict() for p in pipelines]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_diffusers_reads_our_kohya_file_of_flux(tmp_path):
    """A converter that we did not write; it knows FLUX's own widths, so the LoRA has them."""
    torch.manual_seed(0)
    found = lora_formats.Lora()
    names = [f"transformer_blocks.0.attn.{n}" for n in (*lora_names.QKV, "to_out.0")]
    names += [f"single_transformer_blocks.1.attn.{n}" for n in lora_names.QKV]
    for name in names:
        layer = lora_formats.Layer(torch.randn(4, 3072), torch.randn(3072, 4), 8.0)
        found.add("transformer", name, layer)
    file = tmp_path / "kohya.safetensors"
    lora_formats.write(found, file, to="kohya", family="flux")
    theirs = conversions._convert_kohya_flux_lora_to_diffusers(load_file(file))
    for name in names:  # they fold alpha / rank into the matrices
        layer = found.parts["transformer"][name]
        ours = 2.0 * layer.up @ layer.down
        a, b = (theirs[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a, ours)
    extra = theirs.keys() - {f"transformer.{n}.lora_{x}.weight" for n in names for x in "AB"}
    assert all("proj_mlp" in key for key in extra)
    assert not any(theirs[key].any() for key in extra)


def test_kohyas_keys_are_those_of_sd_scripts(tmp_path):
    lora_formats.write(
        lora_formats.read(exported(trained("sd3"), tmp_path)),
        tmp_path / "k.safetensors",
        to="kohya",
        family="sd3",
    )
    keys = load_file(tmp_path / "k.safetensors").keys()
    block = "lora_unet_joint_blocks_0_x_block"
    assert {f"{block}_attn_qkv.lora_down.weight", f"{block}_mlp_fc1.alpha"} <= keys
    assert f"{block}_adaLN_modulation_1.lora_up.weight" in keys


def test_the_last_context_modulation_of_sd3_is_swapped(tmp_path):
    """(scale, shift) in diffusers, (shift, scale) in the release: conversion of the base does the same."""
    found = lora_formats.Lora()
    up = torch.arange(8.0).view(8, 1)
    name = "transformer_blocks.1.norm1_context.linear"
    found.add("transformer", name, lora_formats.Layer(torch.ones(1, 4), up, 1.0))
    file = tmp_path / "k.safetensors"
    lora_formats.write(found, file, to="kohya", family="sd3")
    key = "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1.lora_up.weight"
    assert load_file(file)[key].flatten().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    back = lora_formats.read(file)
    torch.testing.assert_close(back.parts["transformer"][name].up, up)


def test_a_dense_kohya_lora_is_shared_among_the_modules(tmp_path):
    """What sd-scripts trains by default: one LoRA for queries, keys and values together."""
    torch.manual_seed(0)
    down, up = torch.randn(6, 8), torch.randn(24, 6)
    key = "lora_unet_double_blocks_3_img_attn_qkv"
    file = tmp_path / "dense.safetensors"
    save_file(
        {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(3.0),
        },
        file,
    )
    found = deltas(file)
    whole = 0.5 * up @ down
    for i, name in enumerate(lora_names.QKV):
        torch.testing.assert_close(
            found[f"transformer_blocks.3.attn.{name}"], whole[8 * i : 8 * (i + 1)]
        )


def test_alpha_is_in_the_header_and_beside_the_tensors(tmp_path):
    file = exported(trained("sd3"), tmp_path)
    comfy = tmp_path / "comfy.safetensors"
    lora_formats.write(lora_formats.read(file), comfy, to="comfyui")
    with safe_open(file, "pt") as opened:
        assert '"transformer.lora_alpha": 4,' in opened.metadata()["lora_adapter_metadata"]
    with safe_open(comfy, "pt") as opened:
        assert opened.metadata()["ss_network_alpha"] == "4.0"
    alphas = {v.item() for k, v in load_file(comfy).items() if k.endswith(".alpha")}
    assert alphas == {RANK}


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("not a file of tensors")
    with pytest.raises(UsageError, match="no readable safetensors"):
        lora_formats.read(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="holds no LoRA"):
        lora_formats.read(tmp_path / "other.safetensors")
    save_file(
        {"lora_unet_up_blocks_0.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "sd15.safetensors"
    )
    with pytest.raises(UsageError, match="lora_unet_up_blocks_0"):
        lora_formats.read(tmp_path / "sd15.safetensors")
    found = lora_formats.Lora()
    layer = lora_formats.Layer(torch.zeros(1, 4), torch.zeros(4, 1), 1.0)
    found.add("transformer", "elsewhere", layer)
    with pytest.raises(UsageError, match="no name for elsewhere"):
        lora_formats.write(found, tmp_path / "x.safetensors", to="kohya", family="sd3")
    with pytest.raises(UsageError, match="one of flux, flux2, qwen_image, sd3, z_image"):
        lora_formats.write(found, tmp_path / "x.safetensors", to="kohya")


def trained_unet(family, *targets):
    return perturbed(tiny.UNETS[family](), targets)


def drawn(pipeline):
    generator = torch.Generator().manual_seed(0)
    options = {"height": 16, "width": 16, "generator": generator, "output_type": "np"}
    return pipeline("a photo of a ring", num_inference_steps=2, **options).images


@pytest.mark.parametrize("family", sorted(tiny.UNETS))
def test_a_stock_unet_draws_the_same_with_kohyas_file_and_back(family, tmp_path):
    """Of linear layers and of convolutions; diffusers reads kohya's keys of U-Nets by its own rules."""
    model = trained_unet(family, *UNET, *CONVOLUTIONS)
    original = exported(model, tmp_path / "lora")
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    for source, to, file in ((original, "kohya", kohya), (kohya, "diffusers", back)):
        assert cli.main(["convert", str(source), f"--to={to}", f"--output={file}"]) == 0
    attention = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert load_file(kohya)[f"{attention}.alpha"].item() == RANK
    before, after = load_file(original), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    images = {}
    for name, file in (("plain", None), ("a", original), ("kohya", kohya), ("back", back)):
        pipeline = tiny.UNETS[family]().pipeline
        if file is not None:
            pipeline.load_lora_weights(file)
            (adapter,) = pipeline.unet.peft_config.values()
            assert (adapter.r, adapter.lora_alpha) == (RANK, RANK)
        images[name] = drawn(pipeline)
    assert np.abs(images["plain"] - images["a"]).max() > 0.01
    for name in ("kohya", "back"):
        np.testing.assert_allclose(images[name], images["a"], atol=1e-5)
    np.testing.assert_allclose(drawn(model.pipeline), images["a"], atol=1e-5)


def of_the_release():
    """Every kind of place in SDXL's release, as sd-scripts names it."""
    residual = ("in_layers_2", "out_layers_3", "emb_layers_1")
    attention = [f"transformer_blocks_0_attn{i}_to_{x}" for i in (1, 2) for x in "qkv"]
    attention += ["transformer_blocks_0_attn1_to_out_0", "transformer_blocks_0_ff_net_0_proj"]
    attention += ["transformer_blocks_0_ff_net_2", "proj_in", "proj_out"]
    places = {f"input_blocks_{i}_0": residual for i in (1, 2, 4, 5, 7, 8)}
    places |= {f"output_blocks_{i}_0": (*residual, "skip_connection") for i in range(9)}
    places |= {f"input_blocks_{i}_1": attention for i in (4, 5, 7, 8)}
    places |= {f"output_blocks_{i}_1": attention for i in range(6)}
    places |= {"middle_block_0": residual, "middle_block_1": attention, "middle_block_2": residual}
    names = [f"{place}_{inner}" for place, inners in places.items() for inner in inners]
    names += ["input_blocks_3_0_op", "input_blocks_6_0_op", "input_blocks_4_0_skip_connection"]
    return [*names, "output_blocks_2_2_conv", "output_blocks_5_2_conv", "input_blocks_0_0", "out_2"]


def test_the_release_names_of_sdxl_are_read_as_diffusers_reads_them(tmp_path):
    state = {}
    for i, name in enumerate(of_the_release()):
        state[f"lora_unet_{name}.lora_down.weight"] = torch.full((2, 3), float(i))
        state[f"lora_unet_{name}.lora_up.weight"] = torch.full((3, 2), float(i))
        state[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    file = tmp_path / "sdxl.safetensors"
    save_file(state, file)
    ours = lora_formats.read(file)
    ((part, layers),) = ours.parts.items()
    assert part == "unet"
    theirs, _ = StableDiffusionXLPipeline.lora_state_dict(
        state, unet_config=SimpleNamespace(layers_per_block=2)
    )
    theirs = convert_unet_state_dict_to_peft(theirs)
    found = {f"unet.{n}.lora_A.weight": layer.down for n, layer in layers.items()}
    expected = {k.replace(".processor", ""): w for k, w in theirs.items() if ".lora_A." in k}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)
    sdxl = UNet2DConditionModel(  # its blocks, with few channels
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    assert layers.keys() <= {name for name, _ in sdxl.named_modules()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to=comfyui"], "ComfyUI reads LoRAs of U-Nets (SD1.5, SDXL) in kohya's keys"),
        (["--to=kohya", "--family=sd3"], "family='sd3' is for transformers"),
    ],
)
def test_a_unets_lora_has_no_other_keys(flags, message, tmp_path, capsys):
    exported(trained_unet("sd", "to_q"), tmp_path / "lora")
    output = tmp_path / "out" / "x.safetensors"
    assert cli.main(["convert", str(tmp_path / "lora"), *flags, f"--output={output}"]) == 2
    assert message in capsys.readouterr().err
    assert not list(output.parent.glob("*"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight", "text_encoder.a.alpha"],
            "text_encoder.a",
        ),
        (["a.b.lora_A.weight", "a.b.lora_B.weight"], "holds a.b, by which no module"),
        (["transformer.a.lora_A.weight"], "transformer.a has no lora_B"),
        (["transformer.a.lora_A.weight", "transformer.a.dora_scale"], "dora_scale, .* DoRA of Ly"),
        (["lora_unet_up_blocks_0_conv.lora_down.weight"], "has no lora_up"),
        (
            ["lora_unet_up_blocks_0_conv.lora_down.weight", "lora_te_x.lora_down.weight"],
            "lora_te_x",
        ),
        (["lora_unet_up_blocks_0_conv.lora_down.weight", "lora_unet_a.hada_w1_a"], "hada_w1_a"),
        (
            ["lora_unet_up_blocks_0_x.lora_down.weight", "lora_unet_up_blocks_0_x.lora_up.weight"],
            "0_x",
        ),
    ],
)
def test_nothing_of_a_file_is_lost_in_silence(keys, message, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({key: torch.zeros(1, 1) for key in keys}, file)
    with pytest.raises(UsageError, match=message):
        lora_formats.read(file)


def test_from_the_command_line(tmp_path, capsys):
    file = exported(trained("flux"), tmp_path / "lora")
    output = tmp_path / "kohya.safetensors"
    flags = ["--to=kohya", "--family=flux", f"--output={output}"]
    assert cli.main(["convert", str(tmp_path / "lora"), *flags]) == 0
    assert_same(deltas(output), deltas(file))
    assert cli.main(["convert", str(tmp_path / "nowhere"), *flags]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "to"), THEIRS)
def test_diffusers_reads_our_files_of_newer_families(tmp_path, family, to):
    """Converters that we did not write. They fold alpha / rank into the matrices."""
    # diffusers reads ComfyUI's keys of blocks only
    model = trained(family, every=to == "kohya")
    original = exported(model, tmp_path)
    expected = deltas(original)
    file = tmp_path / "converted.safetensors"
    lora_formats.write(lora_formats.read(original), file, to=to, family=family)
    state = load_file(file)
    if to == "comfyui":
        state = {f"diffusion_model.{k.removeprefix('transformer.')}": v for k, v in state.items()}
        # a file of ComfyUI itself has no alpha there
        if family == "flux2":
            state = {k: v for k, v in state.items() if not k.endswith(".alpha")}
    theirs = THEIRS[family, to](state)
    names = {k.rsplit(".lora_", 1)[0].removeprefix("transformer.") for k in theirs}
    # kohya's names of modulations are not known to diffusers
    assert names >= {n for n in expected if "modulation" not in n}
    for name in names:
        a, b = (theirs[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a, expected[name])
