"""Tiny random pipelines of the families whose text encoder is a language model."""

from __future__ import annotations

import torch
from diffusers import (
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
from tiny_parts import SIZE, TEMPLATE, autoencoder, qwen_tokenizer, sizes, spread
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from diffalign.pipelines.flux2 import Flux2Model
from diffalign.pipelines.qwen_image import QwenImageModel
from diffalign.pipelines.z_image import ZImageModel

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def _flux2_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def flux2_transformer(*, guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    spread(transformer)
    return transformer.eval()


def klein_pipeline(seed: int = 0, *, is_distilled: bool = False) -> Flux2KleinPipeline:
    """As many layers of the text encoder as the pipeline reads hidden states of."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    qwen = Qwen3Config(**sizes(tokenizer, layers=28))
    pipeline = Flux2KleinPipeline(
        transformer=flux2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=_flux2_autoencoder(),
        text_encoder=Qwen3ForCausalLM(qwen).eval(),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux2_model(seed: int = 0) -> Flux2Model:
    return Flux2Model(klein_pipeline(seed), max_sequence_length=16, default_size=(SIZE, SIZE))


def z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 32, 32],
    )
    spread(transformer)
    pipeline = ZImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=Qwen3Model(Qwen3Config(**sizes(tokenizer, layers=2))).eval(),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def z_image_model(seed: int = 0) -> ZImageModel:
    return ZImageModel(z_image_pipeline(seed), max_sequence_length=16, default_size=(SIZE, SIZE))


def qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(TEMPLATE)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    spread(transformer)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.2, -0.1, 0.4, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    )
    spread(vae)
    text = {
        **sizes(tokenizer, layers=2),
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": 16})
    pipeline = QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def qwen_image_model(seed: int = 0) -> QwenImageModel:
    return QwenImageModel(
        qwen_image_pipeline(seed), max_sequence_length=16, default_size=(SIZE, SIZE)
    )


MODELS = {"flux2": flux2_model, "z_image": z_image_model, "qwen_image": qwen_image_model}


class Processor:
    """Stands for Mistral's processor, which needs torchvision: messages hold lists of parts."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, conversations, **options):
        joined = [
            [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
            for messages in conversations
        ]
        return self.tokenizer.apply_chat_template(joined, **options)


def flux2_dev_pipeline(seed: int = 0) -> Flux2Pipeline:
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    text = {"model_type": "mistral", **sizes(tokenizer, layers=31)}
    config = Mistral3Config(text_config=text, vision_config=vision)
    pipeline = Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=_flux2_autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=Processor(tokenizer),
    )
    pipeline.system_message = "a"
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
