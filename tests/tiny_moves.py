"""Tiny models in another latent space, and runs that move them there."""

from __future__ import annotations

import numpy as np
import tiny
import torch
from accelerate import Accelerator
from diffusers import AutoencoderDC
from PIL import Image

from diffalign.config import decode
from diffalign.methods.dcgen.trainer import LatentTrainer
from diffalign.pipelines.moving import move_model
from diffalign.training.run_folder import RunFolder

DEPTH = 3
"""Halvings of the side: a token of 8 pixels."""


def deep_autoencoder(seed: int = 0, *, channels: int = 8, scale: float = 1.1) -> AutoencoderDC:
    """A random AutoencoderDC f8, with both kinds of blocks."""
    torch.manual_seed(seed)
    n = DEPTH + 1
    blocks = ("ResBlock",) * DEPTH + ("EfficientViTBlock",)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": blocks,
            "block_out_channels": (8,) * n,
            "layers_per_block": (0,) + (1,) * DEPTH,
            "qkv_multiscales": ((),) * n,
        }.items()
    }
    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=4,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=scale,
        **sides,
    ).eval()


def moved_model(family: str, **autoencoder):
    """A model of the family and itself moved, with random ends."""
    base = tiny.MODELS[family]()
    model = move_model(base, deep_autoencoder(**autoencoder), size=base.default_size)
    with torch.no_grad():
        for end in (model.ends.embedder, model.ends.head):
            layer = model.denoiser.get_submodule(end)
            layer.weight.normal_(0, 0.3)
            layer.bias.normal_(0, 0.1)
    return base, model


def image_folder(folder, n=12, side=32):
    """Captioned images, some of them of one prompt."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.BICUBIC).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a photo of {i % 5} red circles")
    return folder


def settings(folder, source, autoencoder, **groups):
    base = {
        "output_dir": str(folder),
        "model": {"dtype": "float32"},
        "lora": {"rank": 8, "alpha": 8},
        "rewards": {"jpeg": 1.0},
        "latents": {
            "autoencoder": str(autoencoder) if autoencoder else None,
            "images": str(source),
            "alignment_images": 12,
            "dtype": "float32",
            "validation": 0.4,
        },
        "algorithm": {"type": "dcgen", "max_guidance": 4.0},
        "optimizer": {"learning_rate": 0.01},
        "training": {
            "num_updates": 3,
            "mixed_precision": "no",
            "micro_batch_size": 4,
            "images_per_update": 6,
            "checkpoint_every": 1,
            "eval_every": 0,
            "sample_every": 0,
        },
        "evaluation": {"num_inference_steps": 2, "max_prompts": 3},
    }
    for group, values in groups.items():
        base.setdefault(group, {}).update(values)
    return decode(base)


def trainer(folder, source, autoencoder, family="flux", **groups):
    return LatentTrainer(
        settings(folder, source, autoencoder, **groups),
        tiny.MODELS[family](),
        Accelerator(cpu=True),
        RunFolder(folder),
    )
