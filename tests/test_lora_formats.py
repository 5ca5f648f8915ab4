"""LoRA files of other programs: the same update on the model, whatever the keys."""

import pytest
import tiny
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import cli, lora, lora_formats
from diffalign.errors import UsageError

RANK, ALPHA = 4, 12.0
ALL = {
    "sd3": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "flux": ("ff.net.0.proj", "ff.net.2", "proj_mlp", "0.proj_out", "norm.linear"),
}


def trained(family, *, every=True):
    """A pipeline with a perturbed LoRA on attention, or on every matrix of its blocks."""
    model = tiny.MODELS[family]()
    targets = [*model.lora_targets]
    if every:
        targets += [*ALL[family], "norm1.linear", "norm1_context.linear"]
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
    found = lora_formats.read(file)
    return {
        name: found.alpha[name] / down.shape[0] * found.up[name] @ down
        for name, down in found.down.items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("family", ["sd3", "flux"])
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
        assert adapter.lora_alpha == ALPHA
        pipelines.append(pipeline.transformer)
    states = [p.state_dict() for p in pipelines]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_diffusers_reads_our_kohya_file_of_flux(tmp_path):
    """A converter that we did not write; it knows FLUX's own widths, so the LoRA has them."""
    torch.manual_seed(0)
    found = lora_formats.Lora()
    names = [f"transformer_blocks.0.attn.{n}" for n in (*lora_formats.QKV, "to_out.0")]
    names += [f"single_transformer_blocks.1.attn.{n}" for n in lora_formats.QKV]
    for name in names:
        found.add(name, torch.randn(4, 3072), torch.randn(3072, 4), 8.0)
    file = tmp_path / "kohya.safetensors"
    lora_formats.write(found, file, to="kohya", family="flux")
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(file))
    for name in names:  # they fold alpha / rank into the matrices
        ours = 2.0 * found.up[name] @ found.down[name]
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
    found.add("transformer_blocks.1.norm1_context.linear", torch.ones(1, 4), up, 1.0)
    file = tmp_path / "k.safetensors"
    lora_formats.write(found, file, to="kohya", family="sd3")
    key = "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1.lora_up.weight"
    assert load_file(file)[key].flatten().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    back = lora_formats.read(file)
    torch.testing.assert_close(back.up["transformer_blocks.1.norm1_context.linear"], up)


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
    for i, name in enumerate(lora_formats.QKV):
        torch.testing.assert_close(
            found[f"transformer_blocks.3.attn.{name}"], whole[8 * i : 8 * (i + 1)]
        )


def test_alpha_is_in_the_header_and_beside_the_tensors(tmp_path):
    file = exported(trained("sd3"), tmp_path)
    comfy = tmp_path / "comfy.safetensors"
    lora_formats.write(lora_formats.read(file), comfy, to="comfyui")
    with safe_open(file, "pt") as opened:
        assert '"transformer.lora_alpha": 12.0' in opened.metadata()["lora_adapter_metadata"]
    with safe_open(comfy, "pt") as opened:
        assert opened.metadata()["ss_network_alpha"] == "12.0"
    alphas = {v.item() for k, v in load_file(comfy).items() if k.endswith(".alpha")}
    assert alphas == {ALPHA}


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
    found.add("context_embedder", torch.zeros(1, 4), torch.zeros(4, 1), 1.0)
    with pytest.raises(UsageError, match="no name for context_embedder"):
        lora_formats.write(found, tmp_path / "x.safetensors", to="kohya", family="sd3")
    with pytest.raises(UsageError, match="sd3 or flux"):
        lora_formats.write(found, tmp_path / "x.safetensors", to="kohya")


def test_from_the_command_line(tmp_path, capsys):
    file = exported(trained("flux"), tmp_path / "lora")
    output = tmp_path / "kohya.safetensors"
    flags = ["--to=kohya", "--family=flux", f"--output={output}"]
    assert cli.main(["convert", str(tmp_path / "lora"), *flags]) == 0
    assert_same(deltas(output), deltas(file))
    assert cli.main(["convert", str(tmp_path / "nowhere"), *flags]) == 2
    assert "nowhere" in capsys.readouterr().err
