"""The tiny `AutoencoderKL` of Shapes (f4, 4 channels) and its training from nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.shapes.world import (
    COLORS,
    GRID,
    IMAGE_SIZE,
    JITTER,
    KINDS,
    MAX_OBJECTS,
    SIZES,
    SceneObject,
    render,
)

KL_WEIGHT = 1e-4


def build_autoencoder() -> AutoencoderKL:
    """4x compression per side, 64 px to (4, 16, 16); narrow where the resolution is high, for CPUs."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_deep_autoencoder() -> AutoencoderDC:
    """16x compression per side, 64 px to (32, 4, 4): a quarter of the tokens that patches of the other's latents make,
    as FLUX.1's at 1K become with DC-AE f32c32. Nothing is computed at the full resolution."""
    stages = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 2
    widths, layers, none = (16, 32, 64, 64, 64), (0, 1, 2, 1, 1), ((),) * 5
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=16,
        encoder_block_types=stages,
        decoder_block_types=stages,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,
    )


def random_images(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 64, 64, 3) uint8 of one to four arbitrary objects: an autoencoder needs no prompts."""
    images = []
    for _ in range(n):
        cells = rng.permutation(len(GRID) ** 2)[: rng.integers(1, MAX_OBJECTS + 1)]
        images.append(
            render(
                tuple(
                    SceneObject(
                        kind=str(rng.choice(KINDS)),
                        color=str(rng.choice(list(COLORS))),
                        x=GRID[cell % 3] + rng.uniform(-JITTER, JITTER),
                        y=GRID[cell // 3] + rng.uniform(-JITTER, JITTER),
                        size=float(rng.uniform(*SIZES)),
                    )
                    for cell in cells
                )
            )
        )
    return np.stack(images)


def to_pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in -1..1, channels last in memory."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    folder: Path, *, steps: int = 2000, batch_size: int = 32, lr: float = 2e-3, seed: int = 0
) -> AutoencoderKL:
    """Train (absolute error, a light KL), set the latents' scale and shift, and save to `folder`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="autoencoder", mininterval=10)
    for _ in bar:
        pixels = to_pixels(random_images(rng, batch_size))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = (decoded.float() - pixels).abs().mean() + (decoded.float() - pixels).square().mean()
        loss = error + KL_WEIGHT * posterior.kl().mean() / 100
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(error=f"{error.item():.4f}", refresh=False)
    _set_scale(vae.eval(), rng)
    vae.to(torch.bfloat16).save_pretrained(folder)
    return vae


@torch.no_grad()
def _set_scale(vae: AutoencoderKL, rng: np.random.Generator) -> None:
    """Scale and shift so that latents have zero mean and unit variance, as SD3's and FLUX's do."""
    latents = vae.encode(to_pixels(random_images(rng, 512))).latent_dist.mode()
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
