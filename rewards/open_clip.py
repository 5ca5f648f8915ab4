"""Conversion of open_clip checkpoints to transformers' `CLIPModel`.

Names change, and fused projections are split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from diffalign.rewards.base import RewardError

TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_BLOCK = re.compile(r"^((?:visual\.)?transformer\.resblocks)\.(\d+)\.(.+)\.(weight|bias)$")
_FUSED = re.compile(r"^((?:visual\.)?transformer\.resblocks)\.(\d+)\.attn\.in_proj_(weight|bias)$")


def convert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert open_clip's names to those of `CLIPModel`.

    Raises:
        RewardError: a name does not occur in open_clip's ViT models.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "attn_mask":  # a buffer
            continue
        if name in NAMES:
            converted[NAMES[name]] = value
        elif name in PROJECTIONS:
            converted[PROJECTIONS[name]] = value.T.contiguous()
        elif match := _FUSED.match(name):
            tower, layer, kind = match.groups()
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[f"{TOWERS[tower]}.{layer}.self_attn.{part}_proj.{kind}"] = (
                    rows.contiguous()
                )
        elif (match := _BLOCK.match(name)) and match[3] in LAYER:
            tower, layer, part, kind = match.groups()
            converted[f"{TOWERS[tower]}.{layer}.{LAYER[part]}.{kind}"] = value
        else:
            raise RewardError(f"{name} is no tensor of a CLIP checkpoint in open_clip's layout")
    return converted


def build(
    state: Mapping[str, Tensor], *, vision_heads: int, text_heads: int, hidden_act: str = "gelu"
) -> CLIPModel:
    """Build the model of a checkpoint in float32.

    All sizes but the numbers of heads follow from the tensors.
    """
    converted = convert_names(state)
    patch = converted["vision_model.embeddings.patch_embedding.weight"]
    positions = len(converted["vision_model.embeddings.position_embedding.weight"])
    tokens = converted["text_model.embeddings.token_embedding.weight"]
    config = CLIPConfig(
        projection_dim=len(converted["text_projection.weight"]),
        vision_config={
            "hidden_size": len(patch),
            "intermediate_size": _width(converted, "vision_model"),
            "num_hidden_layers": _layers(converted, "vision_model"),
            "num_attention_heads": vision_heads,
            "patch_size": patch.shape[-1],
            "image_size": patch.shape[-1] * round((positions - 1) ** 0.5),
            "hidden_act": hidden_act,
        },
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": tokens.shape[1],
            "intermediate_size": _width(converted, "text_model"),
            "num_hidden_layers": _layers(converted, "text_model"),
            "num_attention_heads": text_heads,
            "max_position_embeddings": len(
                converted["text_model.embeddings.position_embedding.weight"]
            ),
            "hidden_act": hidden_act,
            # open_clip reads the text at its highest token, which is the end
            "eos_token_id": len(tokens) - 1,
            "bos_token_id": len(tokens) - 2,
        },
    )
    # initialising a billion random numbers would take minutes
    with init_empty_weights(include_buffers=False):
        model = CLIPModel(config)
    missing, unexpected = model.load_state_dict(converted, strict=False, assign=True)
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or unexpected:
        raise RewardError(
            f"the checkpoint lacks {missing[:3]} or has too many tensors: {unexpected[:3]}"
        )
    return model.float()


def _width(state: Mapping[str, Tensor], tower: str) -> int:
    return len(state[f"{tower}.encoder.layers.0.mlp.fc1.weight"])


def _layers(state: Mapping[str, Tensor], tower: str) -> int:
    return sum(name.startswith(tower) and name.endswith("mlp.fc1.weight") for name in state)
