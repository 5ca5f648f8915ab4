"""The published configurations of denoisers, for what depends on shapes alone: sizes on the meta device, speed and
memory with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
SANA = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "attention_head_dim": 32,
    "num_attention_heads": 70,
    "cross_attention_head_dim": 112,
    "num_cross_attention_heads": 20,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
}
LAYOUTS: dict[str, tuple[type, dict[str, Any]]] = {
    "sd1.5": (UNet2DConditionModel, SD15),
    "sdxl": (UNet2DConditionModel, SDXL),
    "sd3.5-medium": (SD3Transformer2DModel, SD35_MEDIUM),
    "flux.1-dev": (FluxTransformer2DModel, {**FLUX, "guidance_embeds": True}),
    "flux.1-schnell": (FluxTransformer2DModel, FLUX),
    "sana-1.6b": (SanaTransformer2DModel, SANA),
}


def denoiser(name: str, *, device: str = "meta", **changes: Any) -> Any:
    """A published layout in bfloat16, with random weights where the device has any."""
    kind, published = LAYOUTS[name]
    with torch.device(device):
        model = kind(**{**published, **changes})
    return torch.nn.Module.to(model, torch.bfloat16)  # diffusers' own warns about float32 parts
