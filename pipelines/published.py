"""Published configurations of named models, for uses that depend on shapes only.

The uses are sizes on the meta device, memory forecasts without the hub, and measurements with random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from diffalign.pipelines import published_llm

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
SD35_LARGE = {
    **SD35_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
LAYOUTS: dict[str, tuple[type, dict[str, Any]]] = {
    "sd1.5": (UNet2DConditionModel, SD15),
    "sdxl": (UNet2DConditionModel, SDXL),
    "sd3.5-medium": (SD3Transformer2DModel, SD35_MEDIUM),
    "sd3.5-large": (SD3Transformer2DModel, SD35_LARGE),
    "flux.1-dev": (FluxTransformer2DModel, {**FLUX, "guidance_embeds": True}),
    "flux.1-schnell": (FluxTransformer2DModel, FLUX),
    "sana-1.6b": (SanaTransformer2DModel, SANA),
    **published_llm.LAYOUTS,
}
SAME = {
    "flux.1-krea": "flux.1-dev",
    "lcm-sd1.5": "sd1.5",
    "pcm-sd1.5": "sd1.5",
    "sdxl-turbo": "sdxl",
}
"""Named models that have the layout of another named model."""
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_L |= {"num_hidden_layers": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
CLIP_G |= {"num_hidden_layers": 32, "projection_dim": 1280}
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "vocab_size": 32128}
GEMMA_2B = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
GEMMA_2B |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KL_16 = {**KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@dataclass(frozen=True)
class Tokenizer:
    """Substitute for a tokenizer that only knows its length, which sizes depend on."""

    model_max_length: int


def denoiser(name: str, *, device: str = "meta", **changes: Any) -> Any:
    """Return a denoiser of a published layout in bfloat16.

    Its weights are random, except on the meta device, where it has none.
    """
    kind, published = LAYOUTS[name]
    with torch.device(device):
        model = kind(**{**published, **changes})
    # diffusers' own `to` warns about float32 parts
    return torch.nn.Module.to(model, torch.bfloat16)


def is_published(name: str) -> bool:
    """Return True for the name of a model that `pipeline` can build."""
    return SAME.get(name, name) in LAYOUTS


def pipeline(name: str) -> Any:
    """Return a named model's pipeline on the meta device, in bfloat16.

    Its tokenizers only know their length.
    """
    if name in published_llm.LAYOUTS:
        with torch.device("meta"):
            return published_llm.pipeline(name, denoiser(name), Tokenizer(512))
    turbo = name == "sdxl-turbo"
    name = SAME.get(name, name)
    with torch.device("meta"):
        parts = _encoders(name)
        if name == "sana-1.6b":
            parts["vae"] = AutoencoderDC(latent_channels=32)
        else:
            parts["vae"] = AutoencoderKL(**(KL if name in ("sd1.5", "sdxl") else KL_16))
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.bfloat16)
    unet = name in ("sd1.5", "sdxl")
    parts["unet" if unet else "transformer"] = denoiser(name)
    if name == "sd1.5":
        no_checker = {"safety_checker": None, "feature_extractor": None}
        scheduler = PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True)
        return StableDiffusionPipeline(
            **parts, **no_checker, scheduler=scheduler, requires_safety_checker=False
        )
    if name == "sdxl":
        scheduler = EulerDiscreteScheduler(**SCALED_LINEAR)
        if turbo:
            scheduler = EulerAncestralDiscreteScheduler(
                **SCALED_LINEAR, timestep_spacing="trailing", steps_offset=1
            )
        return StableDiffusionXLPipeline(**parts, scheduler=scheduler)
    if name == "sana-1.6b":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return SanaPipeline(**parts, scheduler=DPMSolverMultistepScheduler(**flow))
    if name.startswith("flux"):
        dynamic = name == "flux.1-dev"
        options = {"use_dynamic_shifting": dynamic, "shift": 3.0 if dynamic else 1.0}
        return FluxPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(**options))
    return StableDiffusion3Pipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def _encoders(name: str) -> dict[str, Any]:
    """Return text encoders and tokenizers of a layout, on the active device."""
    clip, projected = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection

    def text(kind: Any, sizes: dict[str, Any]) -> Any:
        return kind(transformers.CLIPTextConfig(**sizes))

    def t5() -> Any:
        return transformers.T5EncoderModel(transformers.T5Config(**T5_XXL))

    short, long = Tokenizer(77), Tokenizer(512)
    if name == "sd1.5":
        return {"text_encoder": text(clip, CLIP_L), "tokenizer": short}
    if name == "sdxl":
        encoders = {"text_encoder": text(clip, CLIP_L), "text_encoder_2": text(projected, CLIP_G)}
        return {**encoders, "tokenizer": short, "tokenizer_2": short}
    if name == "sana-1.6b":
        gemma = transformers.Gemma2Model(transformers.Gemma2Config(**GEMMA_2B))
        return {"text_encoder": gemma, "tokenizer": long}
    if name.startswith("flux"):
        encoders = {"text_encoder": text(clip, CLIP_L), "text_encoder_2": t5()}
        return {**encoders, "tokenizer": short, "tokenizer_2": long}
    encoders = {"text_encoder": text(projected, CLIP_L), "text_encoder_2": text(projected, CLIP_G)}
    tokenizers = {"tokenizer": short, "tokenizer_2": short, "tokenizer_3": long}
    return {**encoders, "text_encoder_3": t5(), **tokenizers}
