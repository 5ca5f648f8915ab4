"""Assemble Shapes pipelines from their parts, in diffusers' directory format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel, T5EncoderModel, T5Tokenizer

from diffalign.core.files import folder_aside, write_text
from diffalign.pipelines import saving
from diffalign.pipelines.cards import PUBLISHED
from diffalign.scripts.shapes.autoencoder import fold_shift
from diffalign.scripts.shapes.denoiser import (
    build_flux_transformer,
    build_sd3_transformer,
    build_sd_unet,
)
from diffalign.shapes.text import (
    PADDED_LENGTHS,
    WIDTH,
    build_clip,
    build_clip_tokenizer,
    build_t5,
    build_t5_tokenizer,
    clip_features,
    t5_features,
    train_text_encoder,
)


def pretrained_clip(
    tokenizer: CLIPTokenizer, *, projection: bool, steps: int, seed: int, last: bool = False
) -> PreTrainedModel:
    """Train a tiny CLIP text encoder that understands Shapes' captions.

    With `last`, the last layer's tokens hold the caption, otherwise those of the layer before.
    """
    torch.manual_seed(seed)
    encoder = build_clip(tokenizer, projection=projection)
    train_text_encoder(
        encoder,
        encode=clip_features(encoder, last=last),
        tokenizer=tokenizer,
        width=WIDTH,
        steps=steps,
        seed=seed,
    )
    return encoder


def pretrained_t5(tokenizer: T5Tokenizer, *, steps: int) -> T5EncoderModel:
    """Train a tiny T5 encoder that understands Shapes' captions with any padding."""
    torch.manual_seed(0)
    encoder = build_t5(tokenizer)
    # With the small default T5 hardly sees the order of words, and still confuses two objects after 3,200 steps.
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(bias.weight, std=1.0)
    train_text_encoder(
        encoder,
        encode=t5_features(encoder),
        tokenizer=tokenizer,
        width=2 * WIDTH,
        lengths=PADDED_LENGTHS,
        batch_size=64,
        steps=steps,
    )
    return encoder


def build_sd3_pipeline(
    vae: AutoencoderKL, *, transformer: nn.Module | None = None, text_steps: int = 400
) -> StableDiffusion3Pipeline:
    """Build `shapes-sd3` with two CLIP encoders and T5."""
    tokenizer, tokenizer_3 = build_clip_tokenizer(), build_t5_tokenizer()
    encoders = [
        pretrained_clip(tokenizer, projection=True, steps=text_steps, seed=seed) for seed in (0, 1)
    ]
    return StableDiffusion3Pipeline(
        transformer=transformer or build_sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=pretrained_t5(tokenizer_3, steps=2 * text_steps),
        tokenizer_3=tokenizer_3,
    )


def build_flux_pipeline(
    vae: AutoencoderKL, *, transformer: nn.Module | None = None, text_steps: int = 400
) -> FluxPipeline:
    """Build `shapes-flux` with CLIP's pooled vector and T5's tokens.

    The shift depends on the resolution, as in FLUX.1-dev.
    """
    tokenizer, tokenizer_2 = build_clip_tokenizer(), build_t5_tokenizer()
    return FluxPipeline(
        transformer=transformer or build_flux_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=64,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=pretrained_clip(tokenizer, projection=False, steps=text_steps, seed=0),
        tokenizer=tokenizer,
        text_encoder_2=pretrained_t5(tokenizer_2, steps=2 * text_steps),
        tokenizer_2=tokenizer_2,
    )


def build_sd_pipeline(
    vae: AutoencoderKL, *, transformer: nn.Module | None = None, text_steps: int = 400
) -> StableDiffusionPipeline:
    """Build `shapes-sd` with one CLIP encoder and SD1.5's noise schedule.

    It samples with DDIM and has the shift in its autoencoder.
    """
    tokenizer = build_clip_tokenizer()
    return StableDiffusionPipeline(
        unet=transformer or build_sd_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=fold_shift(vae),
        text_encoder=pretrained_clip(
            tokenizer, projection=False, steps=2 * text_steps, seed=0, last=True
        ),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline as bf16 safetensors in diffusers' layout, atomically."""
    pipeline.to(dtype=torch.bfloat16)
    with folder_aside(folder) as hidden:
        saving.save_pipeline(pipeline, hidden, card=PUBLISHED.get(folder.name))
        forget_places(hidden)
        shutil.rmtree(folder, ignore_errors=True)


def forget_places(folder: Path) -> None:
    """Remove the folders of this machine from which parts of a pipeline were loaded."""
    for file in folder.rglob("*.json"):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.pop("_name_or_path", None) is not None:
            write_text(file, json.dumps(facts, indent=2) + "\n")
