"""Every spelling of a LoRA's names is read as the same update, and nothing of a file is dropped without an error."""

import json
import math

import pytest
import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from diffalign import cli, lora
from diffalign.core.errors import UsageError
from diffalign.lora import files, formats, names

MODELS = {**tiny.MODELS, "sd": tiny.sd_model, "sdxl": tiny.sdxl_model}
RANK, ALPHA = 2, 6.0
PART = {"sd": "unet", "sdxl": "unet"}


def module_of(model):
    return next(
        n
        for n, m in model.denoiser.named_modules()
        if isinstance(m, torch.nn.Linear) and n.endswith("to_q")
    )


def matrices(model, name):
    layer = model.denoiser.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(RANK, layer.in_features, generator=generator)
    return down, torch.randn(layer.out_features, RANK, generator=generator)


def installed(component):
    """{module: update} of whatever carries an adapter."""
    return {
        name: layer.get_delta_weight(layer.active_adapters[0])
        for name, layer in component.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


SPELLINGS = {
    "diffusers": "{part}.{name}.lora_A.weight",
    "peft": "base_model.model.{name}.lora_A.weight",
    "peft in a state dict": "base_model.model.{name}.lora_A.default.weight",
    "bare": "{name}.lora_A.weight",
    "comfyui": "diffusion_model.{name}.lora_A.weight",
    "wrapped": "module._orig_mod.{name}.lora_A.weight",
    "older diffusers": "{part}.{name}.lora.down.weight",
    "simpletuner": "lycoris_{flat}.lora_down.weight",
    "onetrainer": "lora_{kind}_{flat}.lora_down.weight",
    "processors": "{part}.{processor}_lora.down.weight",
    "sharded": "{part}._fsdp_wrapped_module.{sharded}.lora_A.weight",
    "a part of a program": "network.module.model.{name}.lora_A.weight",
    "a program's kohya": "module.lora_unet__orig_mod_{flat}.lora_down.weight",
    "named": "{name}.lora_down.default.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", MODELS)
def test_every_spelling_is_the_same_update(family, spelling, tmp_path):
    model = MODELS[family]()
    name, part = module_of(model), PART.get(family, "transformer")
    down, up = matrices(model, name)
    key = SPELLINGS[spelling].format(
        part=part,
        name=name,
        flat=name.replace(".", "_"),
        sharded=name.replace(".0.", ".0._checkpoint_wrapped_module.", 1),
        kind=part,
        processor=name.replace(".to_q", ".processor.to_q"),
    )
    other = key.replace("lora_A", "lora_B").replace("down", "up")
    other = other.replace("up_blocks", "down_blocks")
    tensors = {key: down, other: up}
    stem = key.split(".lora_A")[0].split(".lora_down")[0].split(".lora.down")[0]
    stem = stem.split("_lora.down")[0]
    save_file(tensors | {f"{stem}.alpha": torch.tensor(ALPHA)}, tmp_path / "a.safetensors")
    lora.load_lora(model.pipeline, str(tmp_path / "a.safetensors"))
    updates = installed(model.denoiser)
    assert list(updates) == [name]
    torch.testing.assert_close(updates[name], ALPHA / RANK * up @ down)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "base_model.model.", "transformer."])
def test_names_of_the_release_with_dots(family, prefix, tmp_path):
    """ai-toolkit and BFL's own tools: queries, keys and values are one matrix."""
    model = MODELS[family]()
    block = {"sd3": "joint_blocks.0.x_block.attn.qkv", "flux": "double_blocks.0.img_attn.qkv"}
    last = "final_layer.adaLN_modulation.1"
    down, up = torch.randn(RANK, 16), torch.randn(48, RANK)
    shift_scale = torch.randn(32, RANK)
    state = {
        f"{prefix}{block[family]}.lora_A.weight": down,
        f"{prefix}{block[family]}.lora_B.weight": up,
        f"{prefix}{last}.lora_A.weight": down.clone(),
        f"{prefix}{last}.lora_B.weight": shift_scale,
    }
    save_file(state, tmp_path / "a.safetensors")
    lora.load_lora(model.pipeline, str(tmp_path / "a.safetensors"))
    updates = installed(model.denoiser)
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(
            updates[f"transformer_blocks.0.attn.to_{name}"], (up @ down)[16 * i : 16 * (i + 1)]
        )
    swapped = torch.cat(shift_scale.chunk(2)[::-1])
    torch.testing.assert_close(updates["norm_out.linear"], swapped @ down)
    assert len(updates) == 4


def peft_folder(folder, model, name, **config):
    down, up = matrices(model, name)
    folder.mkdir()
    keys = {f"base_model.model.{name}.lora_{x}.weight": w for x, w in (("A", down), ("B", up))}
    save_file(keys, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 64, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return up @ down


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 32),
        ({"alpha_pattern": {"to_q": 8}}, 4),
        ({"alpha_pattern": {"to_k": 8}}, 32),
        ({"use_rslora": True}, 64 / math.sqrt(RANK)),
        ({"r": 16, "rank_pattern": {"to_q": RANK}}, 32),
    ],
)
@pytest.mark.parametrize("family", ["sd3", "sd"])
def test_a_folder_of_peft_has_its_strength_from_its_configuration(family, config, scale, tmp_path):
    model = MODELS[family]()
    name = module_of(model)
    product = peft_folder(tmp_path / "a", model, name, **config)
    output = tmp_path / "b.safetensors"
    assert cli.main(["convert", str(tmp_path / "a"), "--to=diffusers", f"--output={output}"]) == 0
    (layers,) = formats.read(output).parts.values()
    assert layers[name].scale == pytest.approx(scale)
    lora.load_lora(model.pipeline, str(tmp_path / "a"))
    torch.testing.assert_close(installed(model.denoiser)[name], scale * product)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan is no number"),
        ({"lora_alpha": 1e300}, r"lora_alpha=1e\+300 is no number"),
        ({"lora_alpha": "x"}, "lora_alpha='x' is no number"),
        ({"alpha_pattern": {"to_q": math.inf}}, "alpha_pattern.'to_q'.=inf is no number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] .* no mapping"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern.'\\('. .* no pattern"),
        ({"r": "x"}, "r='x' is no whole number"),
        ({"r": 0}, "r=0 is no whole number"),
        ({"rank_pattern": {"to_q": math.nan}}, "rank_pattern.'to_q'.=nan is no whole number"),
        ({"use_rslora": "false"}, "use_rslora='false'"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias=true"),
    ],
)
def test_other_adapters_of_peft_are_refused(config, message, tmp_path):
    model = MODELS["sd3"]()
    peft_folder(tmp_path / "a", model, module_of(model), **config)
    with pytest.raises(UsageError, match=message):
        lora.load_lora(model.pipeline, str(tmp_path / "a"))


REFUSED = {
    "dora_scale": ("{p}.dora_scale", torch.ones(8, 1), "DoRA of LyCORIS"),
    "loha": ("{p}.hada_w1_a", torch.ones(8, 2), "LoHa"),
    "lokr": ("{p}.lokr_w1", torch.ones(2, 2), "LoKr"),
    "locon": ("{p}.lora_mid.weight", torch.ones(2, 2, 3, 3), "third matrix"),
    "difference": ("{p}.diff", torch.ones(8, 2), "difference of whole weights"),
    "nan": ("{p}.alpha", torch.tensor(float("nan")), "not finite"),
    "huge alpha": ("{p}.alpha", torch.tensor(1e30), "alpha=1.*e.30 is no number"),
    "two alphas": ("{p}.alpha", torch.ones(2), "alpha of .* is 2 numbers"),
    "one matrix": ("{root}elsewhere.lora_A.weight", torch.ones(2, 2), "has no lora_B"),
    "bias": ("{p}.lora_B.bias", torch.ones(2), "lora_B.bias.*lora_bias=True"),
    "bias of a named adapter": ("{p}.lora_B.default.bias", torch.ones(2), "lora_B.default.bias"),
    "second matrix": ("{p}.lora.down.weight", torch.ones(2, 2), "lora.down.weight and .*lora_A"),
    "second adapter": ("{p}.lora_A.old.weight", torch.ones(2, 2), "2 adapters .*without a name"),
    "other layer's adapter": ("{root}x.lora_B.old.weight", torch.ones(2, 2), "2 adapters .*'old'"),
    "a stray tensor": ("something", torch.ones(2), "this is neither"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("family", ["sd3", "sd"])
def test_what_is_no_plain_lora_is_refused_by_all_three(family, kind, tmp_path, monkeypatch):
    """By load and merge, and by convert, which reads with the same function."""
    model = MODELS[family]()
    name, root = module_of(model), f"{PART.get(family, 'transformer')}."
    down, up = matrices(model, name)
    key, tensor, message = REFUSED[kind]
    state = {
        f"{root}{name}.lora_A.weight": down,
        f"{root}{name}.lora_B.weight": up,
        key.format(p=root + name, root=root): tensor,
    }
    file = tmp_path / "a.safetensors"
    save_file(state, file)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    for use in (lora.load_lora, files.merge_lora):
        with pytest.raises(UsageError, match=message):
            use(model.pipeline, str(file))
    with pytest.raises(UsageError, match=message):
        files.read_lora(str(file))
    after = model.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("family", MODELS)
def test_one_layer_without_a_place_is_named_and_nothing_is_loaded(family, tmp_path):
    model = MODELS[family]()
    name, root = module_of(model), f"{PART.get(family, 'transformer')}."
    down, up = matrices(model, name)
    strange = name.replace(".0.", ".90.", 1)
    for missing in (f"{root}{strange}", "text_encoder_3.encoder.layers.99.mlp.fc1"):
        state = {
            f"{place}.lora_{x}.weight": w.clone()
            for place in (root + name, missing)
            for x, w in (("A", down), ("B", up))
        }
        save_file(state, tmp_path / "a.safetensors")
        for use in (lora.load_lora, files.merge_lora):
            with pytest.raises(UsageError, match=r"1 of the file's 2 layers have no place"):
                use(model.pipeline, str(tmp_path / "a.safetensors"))
        assert not installed(model.denoiser)


def text_keys(model, prefix):
    layer = model.pipeline.text_encoder.get_submodule(own_text_name(model))
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(RANK, layer.in_features, generator=generator)
    up = torch.randn(layer.out_features, RANK, generator=generator)
    return {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}, up @ down


def own_text_name(model):
    names = dict(model.pipeline.text_encoder.named_modules())
    return next(n for n in names if n.endswith("layers.0.self_attn.q_proj"))


@pytest.mark.parametrize(
    ("family", "te"), [("sd", "te"), ("sdxl", "te1"), ("sd3", "te1"), ("flux", "te1")]
)
def test_layers_of_text_encoders_are_loaded_merged_and_converted(family, te, tmp_path):
    model = MODELS[family]()
    state, product = text_keys(model, f"lora_{te}_text_model_encoder_layers_0_self_attn_q_proj")
    file, back = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(state, file)
    flags = ["--to=diffusers", f"--output={back}"]
    assert cli.main(["convert", str(file), *flags]) == 0
    for path in (file, back):
        model = MODELS[family]()
        encoder, name = model.pipeline.text_encoder, own_text_name(model)
        before = encoder.get_submodule(name).weight.clone()
        files.merge_lora(model.pipeline, str(path))
        torch.testing.assert_close(encoder.get_submodule(name).weight - before, product)
        model = MODELS[family]()
        lora.load_lora(model.pipeline, str(path))
        torch.testing.assert_close(installed(model.pipeline.text_encoder)[name], product)
        model.pipeline.unload_lora_weights()
        assert not installed(model.pipeline.text_encoder)


def test_t5_of_flux_is_kohya_s_third_encoder(tmp_path):
    model = MODELS["flux"]()
    encoder = model.pipeline.text_encoder_2
    name = "encoder.block.0.layer.0.SelfAttention.q"
    layer = encoder.get_submodule(name)
    down, up = torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)
    stem = f"lora_te3_{name.replace('.', '_')}"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    before = layer.weight.clone()
    files.merge_lora(model.pipeline, str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(layer.weight - before, up @ down)


@pytest.mark.parametrize("family", ["sd3", "sd"])
def test_peft_s_dora_is_merged_as_it_is_loaded(family, tmp_path):
    model = MODELS[family]()
    name, root = module_of(model), f"{PART.get(family, 'transformer')}."
    down, up = matrices(model, name)
    magnitude = torch.rand(up.shape[0]) + 0.5
    state = {
        f"{root}{name}.lora_A.weight": down,
        f"{root}{name}.lora_B.weight": up,
        f"{root}{name}.lora_magnitude_vector": magnitude,
    }
    file = tmp_path / "a.safetensors"
    save_file(state, file)
    inputs = torch.randn(3, down.shape[1])
    lora.load_lora(model.pipeline, str(file))
    expected = model.denoiser.get_submodule(name)(inputs)
    merged = MODELS[family]()
    files.merge_lora(merged.pipeline, str(file))
    torch.testing.assert_close(
        merged.denoiser.get_submodule(name)(inputs), expected, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UsageError, match="is a DoRA"):
        formats.write(files.read_lora(str(file)), tmp_path / "b.safetensors", to="diffusers")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", formats.FORMATS)
def test_short_floats_are_computed_with_in_float32(dtype, to, tmp_path):
    torch.manual_seed(0)
    block = "transformer.transformer_blocks.0.attn"
    names = [f"{block}.to_{x}" for x in "qv"]
    state = {f"{n}.lora_A.weight": torch.randn(2, 16).to(dtype) for n in names}
    state |= {f"{n}.lora_B.weight": torch.randn(16, 2).to(dtype) for n in names}
    save_file(state, tmp_path / "a.safetensors")
    flags = [f"--to={to}", f"--output={tmp_path / 'b.safetensors'}"]
    flags += ["--family=sd3"] if to == "kohya" else []
    assert cli.main(["convert", str(tmp_path / "a.safetensors"), *flags]) == 0
    before, after = (formats.read(tmp_path / f"{x}.safetensors") for x in "ab")
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"):
        one, other = (f.parts["transformer"][name] for f in (before, after))
        torch.testing.assert_close(
            one.scale * one.up @ one.down, other.scale * other.up @ other.down
        )


def test_a_quantised_layer_is_not_merged_into(tmp_path):
    model = MODELS["sd3"]()
    name = module_of(model)
    down, up = matrices(model, name)
    layer = model.denoiser.get_submodule(name)
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    state = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="is quantised. Merge into the plain base"):
        files.merge_lora(model.pipeline, str(tmp_path / "a.safetensors"))


def as_comfyui_reads(file):
    """{module: update} for a program that knows no header: alpha is a tensor beside the pair, else the scale is 1."""
    state = load_file(file)
    updates = {}
    for key in (k for k in state if k.endswith(".lora_B.weight")):
        name = key.removesuffix(".lora_B.weight")
        down, up = state[f"{name}.lora_A.weight"], state[key]
        alpha = state.get(f"{name}.alpha")
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        updates[name] = scale * up.flatten(1) @ down.flatten(1)
    return updates


@pytest.mark.parametrize("family", MODELS)
def test_a_run_s_own_lora_has_the_same_strength_everywhere(family, tmp_path):
    model = MODELS[family]()
    targets = ("to_q", "to_k", "conv1") if family in PART else model.lora_targets
    parameters = lora.attach(model.denoiser, rank=RANK, alpha=4 * RANK, targets=targets)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))
    expected = installed(model.denoiser)
    part = PART.get(family, "transformer")
    file = lora.export_lora(model.denoiser, model.pipeline, tmp_path)
    elsewhere = as_comfyui_reads(file)
    assert elsewhere.keys() == {f"{part}.{n}" for n in expected}
    for name, update in expected.items():
        torch.testing.assert_close(elsewhere[f"{part}.{name}"], update.flatten(1))
    stock = MODELS[family]().pipeline
    stock.load_lora_weights(tmp_path)
    stocks = installed(getattr(stock, part))
    assert stocks.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(stocks[name], update)


@pytest.mark.parametrize("family", MODELS)
def test_only_flux_of_the_stock_loaders_takes_tensors_of_alpha(family, tmp_path):
    """Why the strength of a run's LoRA is in its matrices."""
    model = MODELS[family]()
    name, root = module_of(model), f"{PART.get(family, 'transformer')}."
    down, up = matrices(model, name)
    state = {
        f"{root}{name}.lora_A.weight": down,
        f"{root}{name}.lora_B.weight": up,
        f"{root}{name}.alpha": torch.tensor(ALPHA),
    }
    if family == "flux":
        model.pipeline.load_lora_weights(state)
        torch.testing.assert_close(installed(model.denoiser)[name], ALPHA / RANK * up @ down)
    else:
        with pytest.raises(
            ValueError, match="Invalid (LoRA|adapter) checkpoint|Target modules .* not found"
        ):
            model.pipeline.load_lora_weights(state)


@pytest.mark.parametrize("old", ["to_{}_lora.down", "{}_proj.lora_linear_layer.down"])
@pytest.mark.parametrize("letter", ["q", "out"])
def test_old_names_of_text_encoders_attention(old, letter):
    layer = "text_model.encoder.layers.0.self_attn"
    key = names.split_key(f"text_encoder.{layer}.{old.format(letter)}.weight")
    assert key.kind == "down"
    assert names.find_place(key.module) == names.Place("text_encoder", (f"{layer}.{letter}_proj",))


@pytest.mark.parametrize("ends", ["default old", "default old default old"])
def test_the_adapters_of_one_file_are_named(ends, tmp_path):
    matrices = zip("ABAB", ends.split(), strict=False)
    keys = [f"transformer.x_embedder.lora_{x}.{name}.weight" for x, name in matrices]
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="2 adapters \\('default', 'old'\\)"):
        files.read_lora(str(tmp_path / "a.safetensors"))


def test_the_same_place_under_two_names_is_an_error(tmp_path):
    name = "transformer_blocks.0.attn.to_q"
    state = {
        f"{p}{name}.lora_{x}.weight": torch.ones(2, 2) for p in ("", "transformer.") for x in "AB"
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="twice"):
        files.read_lora(str(tmp_path / "a.safetensors"))
