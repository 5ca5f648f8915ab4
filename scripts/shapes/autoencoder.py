"""Build the autoencoders of Shapes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, AutoencoderKL

from diffalign.shapes.world import (
    IMAGE_SIZE,
)


def build_autoencoder() -> AutoencoderKL:
    """Build the autoencoder of 4x compression per side: 64 px become (4, 16, 16).

    It is narrow where the resolution is high, for CPUs.
    """
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


@torch.no_grad()
def fold_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """Move the `shift_factor` of an autoencoder into weights of Stable Diffusion's layout.

    StableDiffusionPipeline reads no shift. The two 1x1 convolutions of that layout can hold it to the bit, since
    neither pads: `quant_conv` subtracts it from the means, `post_quant_conv` adds it again.
    """
    if vae.quant_conv is not None or vae.post_quant_conv is not None:
        raise ValueError(
            "use_quant_conv: the autoencoder has convolutions between its halves, which cannot hold a shift. Pass one "
            "without them."
        )
    channels, shift = vae.config.latent_channels, vae.config.shift_factor or 0.0
    folded = AutoencoderKL.from_config(
        vae.config, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None
    )
    folded.load_state_dict(vae.state_dict(), strict=False)
    for layer, means in ((folded.quant_conv, -shift), (folded.post_quant_conv, shift)):
        layer.weight.copy_(torch.eye(layer.in_channels)[:, :, None, None])
        layer.bias.zero_()
        layer.bias[:channels] = means
    return folded.to(vae.dtype).eval()


def build_deep_autoencoder() -> AutoencoderDC:
    """Build the autoencoder of 16x compression per side: 64 px become (32, 4, 4).

    It has a quarter of the tokens of 2 x 2 patches of the other autoencoder's latents, like DC-AE f32c32 for FLUX.1 at
    1K. No layer works at the full resolution.
    """
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
