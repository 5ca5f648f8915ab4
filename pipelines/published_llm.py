"""Published configurations of models whose text encoder is a language model."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
LAYOUTS: dict[str, tuple[type, dict[str, Any]]] = {
    "flux.2-dev": (Flux2Transformer2DModel, {}),
    "flux.2-klein-base-4b": (Flux2Transformer2DModel, KLEIN_4B),
    "flux.2-klein-base-9b": (Flux2Transformer2DModel, KLEIN_9B),
    "flux.2-klein-4b": (Flux2Transformer2DModel, KLEIN_4B),
    "flux.2-klein-9b": (Flux2Transformer2DModel, KLEIN_9B),
    "z-image": (ZImageTransformer2DModel, {}),
    "z-image-turbo": (ZImageTransformer2DModel, {}),
    "qwen-image": (QwenImageTransformer2DModel, {}),
    "qwen-image-2512": (QwenImageTransformer2DModel, {}),
}
"""Denoisers and their configurations by name.

Where nothing is said, the defaults of diffusers' class are the published ones.
"""
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    **QWEN3_4B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
QWEN25_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
QWEN25_VISION = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
MISTRAL_SMALL: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 1540,
    "patch_size": 14,
}
QWEN_SCHEDULE = {
    "use_dynamic_shifting": True,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
KL_16 = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


def pipeline(name: str, denoiser: Any, tokenizer: Any) -> Any:
    """Return a model's pipeline on the active device.

    Args:
        denoiser: denoiser of the name's layout.
        tokenizer: substitute for the tokenizer, which sizes do not depend on.
    """
    parts = {"transformer": denoiser, "tokenizer": tokenizer}
    kind: Any
    vae: Any
    schedule: dict[str, Any]
    if name.startswith("z-image"):
        kind, schedule = ZImagePipeline, {"shift": 3.0}
        encoder = transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3_4B))
        vae = AutoencoderKL(**KL_16)
    elif name.startswith("qwen"):
        kind, schedule = QwenImagePipeline, QWEN_SCHEDULE
        config = transformers.Qwen2_5_VLConfig(text_config=QWEN25_7B, vision_config=QWEN25_VISION)
        encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
        vae = AutoencoderKLQwenImage()
    else:
        schedule = {"shift": 3.0, "use_dynamic_shifting": True}
        vae = AutoencoderKLFlux2()
        if name == "flux.2-dev":
            kind = Flux2Pipeline
            mistral = transformers.Mistral3Config(
                text_config=MISTRAL_SMALL, vision_config=PIXTRAL, tie_word_embeddings=False
            )
            encoder = transformers.Mistral3ForConditionalGeneration(mistral)
        else:
            kind = Flux2KleinPipeline
            parts["is_distilled"] = "base" not in name
            qwen = QWEN3_4B if name.endswith("4b") else QWEN3_8B
            encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**qwen))
    # schedules are numbers, and need a real device
    with torch.device("cpu"):
        scheduler = FlowMatchEulerDiscreteScheduler(**schedule)
    for part in (encoder, vae):
        torch.nn.Module.to(part, torch.bfloat16)
    built = kind(**parts, text_encoder=encoder, vae=vae, scheduler=scheduler)
    built.register_to_config(_name_or_path=name)
    return built
