"""Stable Diffusion in a single file: the names that its first release gave to what diffusers names otherwise."""

from __future__ import annotations

import re

from torch import Tensor

RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
UNET = {
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
}
ATTENTION = {
    **{"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
}


def unet_name(name: str, *, layers: int) -> str:
    """A U-Net's parameter, with so many layers per block."""
    for ours, theirs in UNET.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, rest = name.split("_", 1)
    place = re.fullmatch(r"blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", rest)
    block, kind, k, tail = place[1], place[2], int(place[3]), place[4]
    if kind == "resnets":
        for ours, theirs in RESNET.items():
            tail = tail.replace(f"{ours}.", f"{theirs}.")
    if side == "mid":
        return f"middle_block.{2 * k if kind == 'resnets' else 1}.{tail}"
    level = int(block)
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{tail.removeprefix('conv.')}"
        return f"input_blocks.{(layers + 1) * level + k + 1}.{int(kind == 'attentions')}.{tail}"
    if kind == "upsamplers":
        attends = 2 if level == 0 else 1  # the tiny one has attention in its lowest block
        return f"output_blocks.{(layers + 1) * level + layers}.{attends}.{tail}"
    return f"output_blocks.{(layers + 1) * level + k}.{int(kind == 'attentions')}.{tail}"


def vae_name(name: str, *, levels: int) -> str:
    """An autoencoder's parameter."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    for level in range(levels):
        upper = levels - 1 - level
        name = name.replace(f"up_blocks.{level}.resnets", f"up.{upper}.block")
        name = name.replace(f"up_blocks.{level}.upsamplers.0", f"up.{upper}.upsample")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def single_file(pipeline) -> dict[str, Tensor]:
    """All tensors of a tiny Stable Diffusion pipeline under those names."""
    unet, vae = pipeline.unet, pipeline.vae
    found = {}
    for name, value in unet.state_dict().items():
        theirs = unet_name(name, layers=unet.config.layers_per_block)
        found[f"model.diffusion_model.{theirs}"] = value
    levels = len(vae.config.block_out_channels)
    for name, value in vae.state_dict().items():
        theirs = vae_name(name, levels=levels)
        square = "attn_1" in theirs and value.ndim == 2
        found[f"first_stage_model.{theirs}"] = value[:, :, None, None] if square else value
    for name, value in pipeline.text_encoder.state_dict().items():
        inner = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{inner}"] = value
    return {name: value.clone().contiguous() for name, value in found.items()}
