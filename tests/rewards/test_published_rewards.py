"""Checkpoints of published rewards, every tensor by the original's name and shape on the meta device, and what is built
of them: HPS v2 (open_clip's ViT-H/14), ImageReward (BLIP-large and its head), LAION's aesthetic head."""

import itertools

import pytest
import torch

from diffalign.rewards import hpsv2, image_reward, open_clip
from diffalign.rewards.aesthetic import AestheticHead


def empty(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vit_h_14():
    """open_clip's ViT-H-14: 32 blocks of 1280 for images, 24 of 1024 for texts."""
    found = {
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
        "token_embedding.weight": (49408, 1024),
        **norm("visual.ln_pre", 1280),
        **norm("visual.ln_post", 1280),
        **norm("ln_final", 1024),
    }
    for tower, width, layers in (("visual.", 1280, 32), ("", 1024, 24)):
        for i in range(layers):
            block = f"{tower}transformer.resblocks.{i}"
            found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            found[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            found[f"{block}.attn.in_proj_bias"] = (3 * width,)
            found |= linear(f"{block}.attn.out_proj", width, width)
            found |= linear(f"{block}.mlp.c_fc", 4 * width, width)
            found |= linear(f"{block}.mlp.c_proj", width, 4 * width)
    return found


HEAD = ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1))
"""Place in the sequence, and outputs, of the linear layers of LAION's and ImageReward's heads."""


def head(prefix=""):
    widths = [768, *(out for _, out in HEAD)]
    found = {}
    for (place, out), into in zip(HEAD, widths, strict=False):
        found |= linear(f"{prefix}layers.{place}", out, into)
    return found


def blip_large():
    """ImageReward.pt: BLIP's ViT-L/16 for 224 pixels, its BERT that attends to it, and the head."""
    vision = "blip.visual_encoder"
    found = {
        f"{vision}.cls_token": (1, 1, 1024),
        f"{vision}.pos_embed": (1, 197, 1024),
        f"{vision}.patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{vision}.patch_embed.proj.bias": (1024,),
        **norm(f"{vision}.norm", 1024),
    }
    for i in range(24):
        block = f"{vision}.blocks.{i}"
        found |= norm(f"{block}.norm1", 1024) | norm(f"{block}.norm2", 1024)
        found |= linear(f"{block}.attn.qkv", 3072, 1024) | linear(f"{block}.attn.proj", 1024, 1024)
        found |= linear(f"{block}.mlp.fc1", 4096, 1024) | linear(f"{block}.mlp.fc2", 1024, 4096)
    text = "blip.text_encoder"
    found |= {
        f"{text}.embeddings.position_ids": (1, 512),
        f"{text}.embeddings.word_embeddings.weight": (30524, 768),
        f"{text}.embeddings.position_embeddings.weight": (512, 768),
        **norm(f"{text}.embeddings.LayerNorm", 768),
    }
    for i, (kind, seen) in itertools.product(
        range(12), (("attention", 768), ("crossattention", 1024))
    ):
        block = f"{text}.encoder.layer.{i}"
        found |= linear(f"{block}.{kind}.self.query", 768, 768)
        found |= linear(f"{block}.{kind}.self.key", 768, seen)
        found |= linear(f"{block}.{kind}.self.value", 768, seen)
        found |= linear(f"{block}.{kind}.output.dense", 768, 768)
        found |= norm(f"{block}.{kind}.output.LayerNorm", 768)
        found |= linear(f"{block}.intermediate.dense", 3072, 768)
        found |= linear(f"{block}.output.dense", 768, 3072)
        found |= norm(f"{block}.output.LayerNorm", 768)
    projections = linear("blip.vision_proj", 256, 1024) | linear("blip.text_proj", 256, 768)
    return found | projections | head("mlp.")


def numbers(state):
    return sum(x.numel() for x in state.values())


def test_hps_v2_is_open_clips_vit_h():
    state = empty(vit_h_14())
    assert numbers(state) == 986_109_441  # as open_clip counts it
    model = open_clip.build(state, vision_heads=hpsv2.VISION_HEADS, text_heads=hpsv2.TEXT_HEADS).to(
        "meta"
    )
    assert sum(p.numel() for p in model.parameters()) == 986_109_441
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (224, 14, 32)
    assert (text.num_hidden_layers, text.max_position_embeddings) == (24, 77)
    # a head of 80 numbers for images, of 64 for texts
    assert vision.hidden_size // vision.num_attention_heads == 80
    assert text.hidden_size // text.num_attention_heads == 64
    pixels = torch.empty(2, 3, 224, 224, device="meta")
    tokens = torch.ones(2, 77, dtype=torch.long, device="meta")
    output = model(input_ids=tokens, pixel_values=pixels)
    assert output.image_embeds.shape == output.text_embeds.shape == (2, 1024)


def test_a_checkpoint_of_float16_becomes_float32():
    """HPS_v2_compressed.pt is stored in float16."""
    state = {k: v.half() for k, v in empty(vit_h_14()).items()}
    model = open_clip.build(state, vision_heads=16, text_heads=16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_image_reward_is_blip_large():
    state = empty(blip_large())
    model = image_reward.build(state).to("meta")
    left = linear("blip.vision_proj", 256, 1024) | linear("blip.text_proj", 256, 768)
    unused = numbers(empty(left)) + 512  # the buffer of places
    assert sum(p.numel() for p in model.parameters()) == numbers(state) - unused
    vision, text = model.vision.config, model.text.config
    assert (vision.image_size, vision.num_hidden_layers, vision.num_attention_heads) == (
        224,
        24,
        16,
    )
    assert (text.num_hidden_layers, text.num_attention_heads) == (12, 12)
    pixels = torch.empty(2, 3, 224, 224, device="meta")
    assert model.vision(pixel_values=pixels).last_hidden_state.shape == (2, 197, 1024)


def test_the_aesthetic_head_is_laions():
    shapes = head()
    assert {name: tuple(x.shape) for name, x in AestheticHead().state_dict().items()} == shapes
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert AestheticHead.from_state(state)(torch.zeros(3, 768)).shape == (3,)


@pytest.mark.parametrize("build", [open_clip.convert_names, image_reward.convert_names])
def test_nothing_of_a_checkpoint_is_left_unread(build):
    """Every tensor goes somewhere, but for BLIP's own projections and the buffer of places."""
    of_clip = build is open_clip.convert_names
    state = empty(vit_h_14() if of_clip else blip_large())
    converted = build(state)
    left = numbers(state) - numbers(converted)
    assert left == (0 if of_clip else 256 * (1024 + 768 + 2) + 512)
