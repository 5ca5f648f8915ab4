"""Names of LoRA layers: every spelling in use, turned into diffusers' own.

A key of a file is (prefix)(module)(end). The prefix says which component of the pipeline is meant, the end which
matrix. The module is named as in diffusers or as in the original release, with dots or, in kohya's manner, with "_" in
place of every dot. Released models have queries, keys and values in one matrix, so one of their names may stand for
several of diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TRANSFORMER, UNET = "transformer", "unet"
DENOISER = "denoiser"
"""Part of a key whose prefix names no component."""
KOHYA = "lora_unet_"
"""Prefix of all of kohya's names of denoisers, transformers' as well."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

# prefixes of whole checkpoints and programs, which say nothing of the component
WRAPPERS = ("base_model.model.", "diffusion_model.", "model.", "network.")
# names that wrappers of torch put between two others: compilation, sharding, checkpointed layers, data parallelism
_WRAPPED = re.compile(
    r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)[._]|(?:(?<=\.)|^)module\."
)
DOTTED = {
    "transformer.": TRANSFORMER,
    "unet.": UNET,
    **{f"{name}.": name for name in TEXT_ENCODERS},
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
}
UNDERSCORED = {
    KOHYA: DENOISER,
    "lora_transformer_": TRANSFORMER,
    "lycoris_": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
# the release's module, "_" for dots -> diffusers' modules whose outputs it stacks; {} is the number of the block
FLUX = {
    "double_blocks_{}_img_attn_qkv": [f"transformer_blocks.{{}}.attn.{n}" for n in QKV],
    "double_blocks_{}_txt_attn_qkv": [f"transformer_blocks.{{}}.attn.{n}" for n in ADDED_QKV],
    "double_blocks_{}_img_attn_proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks_{}_txt_attn_proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks_{}_img_mlp_0": ["transformer_blocks.{}.ff.net.0.proj"],
    "double_blocks_{}_img_mlp_2": ["transformer_blocks.{}.ff.net.2"],
    "double_blocks_{}_txt_mlp_0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks_{}_txt_mlp_2": ["transformer_blocks.{}.ff_context.net.2"],
    "double_blocks_{}_img_mod_lin": ["transformer_blocks.{}.norm1.linear"],
    "double_blocks_{}_txt_mod_lin": ["transformer_blocks.{}.norm1_context.linear"],
    "single_blocks_{}_linear1": [
        *(f"single_transformer_blocks.{{}}.attn.{n}" for n in QKV),
        "single_transformer_blocks.{}.proj_mlp",
    ],
    "single_blocks_{}_linear2": ["single_transformer_blocks.{}.proj_out"],
    "single_blocks_{}_modulation_lin": ["single_transformer_blocks.{}.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in_in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in_out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in_in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in_out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in_in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in_out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer_linear": ["proj_out"],
    "final_layer_adaLN_modulation_1": ["norm_out.linear"],
}
SD3 = {
    "joint_blocks_{}_x_block_attn_qkv": [f"transformer_blocks.{{}}.attn.{n}" for n in QKV],
    "joint_blocks_{}_x_block_attn2_qkv": [f"transformer_blocks.{{}}.attn2.{n}" for n in QKV],
    "joint_blocks_{}_context_block_attn_qkv": [
        f"transformer_blocks.{{}}.attn.{n}" for n in ADDED_QKV
    ],
    "joint_blocks_{}_x_block_attn_proj": ["transformer_blocks.{}.attn.to_out.0"],
    "joint_blocks_{}_x_block_attn2_proj": ["transformer_blocks.{}.attn2.to_out.0"],
    "joint_blocks_{}_context_block_attn_proj": ["transformer_blocks.{}.attn.to_add_out"],
    "joint_blocks_{}_x_block_mlp_fc1": ["transformer_blocks.{}.ff.net.0.proj"],
    "joint_blocks_{}_x_block_mlp_fc2": ["transformer_blocks.{}.ff.net.2"],
    "joint_blocks_{}_context_block_mlp_fc1": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "joint_blocks_{}_context_block_mlp_fc2": ["transformer_blocks.{}.ff_context.net.2"],
    "joint_blocks_{}_x_block_adaLN_modulation_1": ["transformer_blocks.{}.norm1.linear"],
    "joint_blocks_{}_context_block_adaLN_modulation_1": [
        "transformer_blocks.{}.norm1_context.linear"
    ],
    "x_embedder_proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder_mlp_0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder_mlp_2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder_mlp_0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder_mlp_2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer_linear": ["proj_out"],
    "final_layer_adaLN_modulation_1": ["norm_out.linear"],
}
# XLabs' adapters of FLUX's attention processors
XLABS = {
    "double_blocks_{}_processor_qkv_lora1": FLUX["double_blocks_{}_img_attn_qkv"],
    "double_blocks_{}_processor_qkv_lora2": FLUX["double_blocks_{}_txt_attn_qkv"],
    "double_blocks_{}_processor_proj_lora1": FLUX["double_blocks_{}_img_attn_proj"],
    "double_blocks_{}_processor_proj_lora2": FLUX["double_blocks_{}_txt_attn_proj"],
    "single_blocks_{}_processor_qkv_lora": FLUX["single_blocks_{}_linear1"][:3],
    "single_blocks_{}_processor_proj_lora": FLUX["single_blocks_{}_linear2"],
}
# the names of FLUX.1's blocks, of which some mean other modules
FLUX2 = {
    **{name: FLUX[name] for name in FLUX if "attn" in name or name in ("img_in", "txt_in")},
    "double_blocks_{}_img_mlp_0": ["transformer_blocks.{}.ff.linear_in"],
    "double_blocks_{}_img_mlp_2": ["transformer_blocks.{}.ff.linear_out"],
    "double_blocks_{}_txt_mlp_0": ["transformer_blocks.{}.ff_context.linear_in"],
    "double_blocks_{}_txt_mlp_2": ["transformer_blocks.{}.ff_context.linear_out"],
    "single_blocks_{}_linear1": ["single_transformer_blocks.{}.attn.to_qkv_mlp_proj"],
    "single_blocks_{}_linear2": ["single_transformer_blocks.{}.attn.to_out"],
    "time_in_in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in_out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "guidance_in_in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
    "guidance_in_out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
    "double_stream_modulation_img_lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt_lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation_lin": ["single_stream_modulation.linear"],
    "final_layer_linear": ["proj_out"],
    "final_layer_adaLN_modulation_1": ["norm_out.linear"],
}
# ComfyUI's file of Z-Image has queries, keys and values in one matrix; its other names are diffusers'
Z_IMAGE = {
    f"{blocks}_{{}}_attention_{name}": [f"{blocks}.{{}}.attention.{n}" for n in modules]
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for name, modules in (("qkv", QKV), ("out", ("to_out.0",)))
}
TABLES = {"flux": FLUX, "flux2": FLUX2, "sd3": SD3}
"""Families whose release names its modules in its own way, as kohya does."""
FLAT = ("qwen_image", "z_image")
"""Families whose modules kohya names as diffusers does."""
RELEASED = {**XLABS, **SD3, **FLUX, **Z_IMAGE}
"""Modules of all families by the release's name; {} is the number of the block."""
_BLOCK = re.compile(
    r"((?:(?:double|single|joint)_blocks|layers|noise_refiner|context_refiner)_)(\d+)(_.+)"
)

# Words between which a kohya name of diffusers' modules has its dots; longer words come first.
UNET_WORDS = re.compile(
    r"(?:down|up|transformer)_blocks|mid_block|resnets|attentions|(?:down|up)samplers|attn[12]|to_[qkv]|to_out|ff|net|"
    r"time_emb_proj|proj_in|proj_out|proj|conv_shortcut|conv_in|conv_out|conv[12]?|(?:time|add)_embedding|linear_[12]|\d+"
)
TRANSFORMER_WORDS = re.compile(
    r"(?:single_)?transformer_blocks|attn[12]?|to_add_out|to_out|to_qkv_mlp_proj|to_gate|to_[qkv]|add_[qkv]_proj|"
    r"ff_context|ff|net|proj_mlp|proj_out|proj|norm_out|norm1_context|norm[12]?|linear(?:_(?:in|out|[12]))?|"
    r"time_(?:text|guidance)_embed|time_embed|emb|caption_projection|(?:all_x|cap|t)_embedder|"
    r"(?:timestep|text|guidance|x|context)_embedder|pos_embed|patch_embed|conv_(?:inverted|depth|point)|"
    r"layers|(?:noise|context)_refiner|attention|feed_forward|w[123]|adaLN_modulation|all_final_layer|mlp|"
    r"(?:img|txt)_(?:in|mlp|mod)|(?:double|single)_stream_modulation(?:_img|_txt)?|2-1|\d+"
)
TEXT_WORDS = re.compile(
    r"text_model|text_projection|encoder|layers|self_attn|[qkv]_proj|out_proj|mlp|fc[12]|block|layer|SelfAttention|"
    r"DenseReluDense|wi_[01]|wi|wo|[qkvo]|\d+"
)
UNET_ROOTS = re.compile(
    r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b"
)
TRANSFORMER_ROOTS = re.compile(
    r"(transformer_blocks|single_transformer_blocks|x_embedder|context_embedder|time_text_embed|time_embed|pos_embed|"
    r"patch_embed|caption_projection|norm_out|proj_out|time_guidance_embed|(?:double|single)_stream_modulation\w*|"
    r"layers|noise_refiner|context_refiner|all_x_embedder|all_final_layer|cap_embedder|t_embedder|img_in|txt_in)\b"
)
TEXT_ROOTS = re.compile(r"(text_model|encoder\.layers|text_projection)\b")
# The release's names of U-Nets to diffusers', both with "_" for dots.
UNET_WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
UNET_INNER = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}

# PEFT's state dict has the adapter's name before "weight"; a file that PEFT saves has none
_END = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<letter>[AB])(?:(?:\.(?P<adapter>[\w-]+))?\.weight)?"
    r"|(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<side>down|up)(?:\.(?P<side_adapter>[\w-]+))?\.weight"
    r"|\.(?P<alpha>alpha)"
    r"|\.lora_magnitude_vector(?:\.(?!weight$|bias$)(?P<vector_adapter>[\w-]+))?(?:\.weight)?"
    r")"
)
_XLABS_END = re.compile(
    r"(?P<module>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<side>down|up)\.weight"
)


@dataclass(frozen=True)
class Place:
    """Modules that a name means: `part` is the pipeline's component, `modules` diffusers' names in it.

    Several modules share the outputs of one matrix, in this order. `released`: the name is of the release, whose
    modulations have another order.
    """

    part: str
    modules: tuple[str, ...]
    released: bool = False


@dataclass(frozen=True)
class Key:
    """Parts of a tensor's key: `kind` is "down", "up", "alpha" or "magnitude", `adapter` PEFT's name of the adapter."""

    module: str
    kind: str
    adapter: str = ""


def split_key(key: str) -> Key | None:
    """Return the parts of a key. None for every tensor that is no part of a LoRA."""
    key = _WRAPPED.sub("", key)
    if match := _XLABS_END.fullmatch(key):
        return Key(match["module"], match["side"])
    match = _END.fullmatch(key)
    if match is None:
        return None
    module = match["module"]
    if match["letter"]:
        return Key(module, "down" if match["letter"] == "A" else "up", match["adapter"] or "")
    if match["side"]:
        return Key(module, match["side"], match["side_adapter"] or "")
    return Key(module, "alpha" if match["alpha"] else "magnitude", match["vector_adapter"] or "")


Released = Mapping[str, Sequence[str]]
"""Modules by the release's name."""


def released_by(shapes: Mapping[str, tuple[int, int]]) -> Released:
    """Return the table of the release's names that a file's modules mean.

    FLUX.1 and FLUX.2 have the same names for other modules, and Qwen-Image has FLUX's names of its first layers.

    Args:
        shapes: numbers of inputs and outputs of the file's modules.
    """
    for module, (inputs, outputs) in shapes.items():
        name = _strip(module)[1].replace(".", "_")
        if re.search(r"transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_", name):
            return {n: m for n, m in RELEASED.items() if n not in ("img_in", "txt_in")}
        ends = {
            "_linear1": outputs == 9 * inputs,
            "_linear2": inputs == 4 * outputs,
            "_mlp_0": outputs == 6 * inputs,
            "_mlp_2": inputs == 3 * outputs,
        }
        blocks = "double_blocks_" in name or "single_blocks_" in name
        if "_stream_modulation" in name or (
            blocks and any(name.endswith(e) for e in ends if ends[e])
        ):
            return {**RELEASED, **FLUX2}
    return RELEASED


def find_place(module: str, released: Released = RELEASED) -> Place | None:
    """Return the place that a module's name of any spelling means. None: it means nothing here.

    Args:
        released: the table of `released_by`.
    """
    part, name = _strip(module)
    for prefix, component in UNDERSCORED.items():
        if part == DENOISER and name.startswith(prefix):
            return _underscored(name.removeprefix(prefix), component, released)
    return _dotted(name, part, released)


def _strip(module: str) -> tuple[str, str]:
    """Return the component that the prefixes name, and the rest."""
    part, before = DENOISER, ""
    while before != module:
        before = module
        for prefix in WRAPPERS:
            module = module.removeprefix(prefix)
        for prefix, component in DOTTED.items():
            if part == DENOISER and module.startswith(prefix):
                part, module = component, module.removeprefix(prefix)
    return part, module


def _underscored(name: str, part: str, released: Released) -> Place | None:
    if part in TEXT_ENCODERS:
        dotted = _split_words(name, TEXT_WORDS)
        return None if dotted is None else Place(part, (dotted,))
    if place := _released(name, part, released):
        return place
    for kind, words in ((UNET, UNET_WORDS), (TRANSFORMER, TRANSFORMER_WORDS)):
        if part not in (DENOISER, kind):
            continue
        dotted = _split_words(name, words)
        roots = UNET_ROOTS if kind == UNET else TRANSFORMER_ROOTS
        if dotted is not None and roots.match(dotted):
            return Place(kind, (dotted,))
    return None


def _dotted(name: str, part: str, released: Released) -> Place | None:
    if part in TEXT_ENCODERS:
        return Place(part, (_full_text_name(name),))
    if place := _released(name.replace(".", "_"), part, released):
        return place
    # attention processors of older diffusers
    name = name.replace(".processor.", ".")
    # the single blocks of FLUX.2 have no list there
    if name.endswith(".to_out") and not name.startswith("single_transformer_blocks."):
        name = f"{name}.0"
    if part != DENOISER:
        return Place(part, (name,))
    if UNET_ROOTS.match(name):
        return Place(UNET, (name,))
    if TEXT_ROOTS.match(name):
        return Place("text_encoder", (_full_text_name(name),))
    return Place(TRANSFORMER, (name,)) if TRANSFORMER_ROOTS.match(name) else None


def _full_text_name(name: str) -> str:
    """Return a CLIP module's name in files. Since transformers 5 the model itself has no `text_model`."""
    # older diffusers named the attention of text encoders like that of denoisers
    name = re.sub(r"\.self_attn\.to_([qkv]|out)$", r".self_attn.\1_proj", name)
    return f"text_model.{name}" if name.startswith("encoder.layers.") else name


def _released(name: str, part: str, released: Released) -> Place | None:
    """Return the place of a name of the original release, with "_" for dots."""
    if part != UNET:
        block = _BLOCK.fullmatch(name)
        pattern, number = (f"{block[1]}{{}}{block[3]}", int(block[2])) if block else (name, 0)
        if pattern in released:
            modules = tuple(module.format(number) for module in released[pattern])
            return Place(TRANSFORMER, modules, released=True)
    if part != TRANSFORMER and (unet := _of_unet_release(name)) != name:
        dotted = _split_words(unet, UNET_WORDS)
        return None if dotted is None else Place(UNET, (dotted,))
    return None


def _split_words(name: str, words: re.Pattern[str]) -> str | None:
    """Return the name with dots between its words; None where something else stands in it."""
    parts = words.findall(name)
    return ".".join(parts) if "_".join(parts) == name else None


def _of_unet_release(name: str) -> str:
    """Return diffusers' name of a module of a U-Net's release. Every other name stays.

    Each block of the release is one layer of diffusers' blocks, which have three (two layers and a sampler, down).
    """
    if name in UNET_WHOLE:
        return UNET_WHOLE[name]
    if middle := re.fullmatch(r"middle_block_([012])_(.+)", name):
        place = ("resnets_0", "attentions_0", "resnets_1")[int(middle[1])]
        return f"mid_block_{place}_{UNET_INNER.get(middle[2], middle[2])}"
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", name)
    if match is None:
        return name
    down, inner = match[1] == "input", UNET_INNER.get(match[4], match[4])
    block, layer = divmod(int(match[2]) - down, 3)
    side = "down" if down else "up"
    if inner == "conv":
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    return f"{side}_blocks_{block}_{'attentions' if match[3] == '1' else 'resnets'}_{layer}_{inner}"


def block_numbers(pattern: str, names: Iterable[str]) -> list[int]:
    """Return the block numbers with which a pattern's name occurs. A pattern without a number has 0."""
    expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    matches = [m for name in names if (m := expression.fullmatch(name))]
    return sorted({int(m[1]) if m.re.groups else 0 for m in matches})


def kohya_text_prefix(part: str, parts: Sequence[str]) -> str:
    """Return kohya's prefix of a text encoder: without a number for the only encoder of a U-Net (SD1.5)."""
    if UNET in parts and "text_encoder_2" not in parts:
        return "lora_te_"
    return f"lora_te{TEXT_ENCODERS.index(part) + 1}_"
