"""Stable Diffusion 3 and 3.5: MM-DiT, classifier-free guidance by a second forward, T5 optional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.latents.codec import LatentCodec
from diffalign.latents.move import Ends
from diffalign.pipelines.base import JOINT_ATTENTION, TextToImageModel
from diffalign.types import PromptEmbeds, Size


class SD3Model(TextToImageModel):
    """StableDiffusion3Pipeline behind the common interface."""

    family = "sd3"
    ends = Ends("pos_embed.proj", "proj_out")
    deep_pipeline = "DCGenStableDiffusion3Pipeline"
    lora_targets = JOINT_ATTENTION
    max_sequence_length = 256
    long_tokenizer = "tokenizer_3"

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return PromptEmbeds(embeds, pooled)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        prediction: Tensor = self.denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=embeds.prompt_embeds,
            pooled_projections=embeds.pooled_prompt_embeds,
            return_dict=False,
        )[0]
        return prediction

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        shape = super().latent_shape(size)
        patch, limit = self.denoiser.config.patch_size, self.denoiser.config.pos_embed_max_size
        if max(shape[1:]) > patch * limit:
            largest = patch * limit * self.pipeline.vae_scale_factor
            raise UsageError(
                f"{size[0]}x{size[1]} is beyond this model's position table, which ends at {largest} pixels"
            )
        return shape

    def prompt_shape(self) -> tuple[int, int, int]:
        config = self.denoiser.config
        tokens = self.pipeline.tokenizer.model_max_length + self.max_sequence_length
        return tokens, config.joint_attention_dim, config.pooled_projection_dim

    @property
    def latent_channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels

    @property
    def patch_size(self) -> int:  # type: ignore[override]
        return int(self.denoiser.config.patch_size)

    def moved_config(self, codec: LatentCodec, ratio: int) -> dict[str, Any]:
        """Return the changes of the denoiser's configuration for the latents of a codec."""
        # the table of positions depends on the tokens per side of `sample_size`, whose number does not change
        config = self.denoiser.config
        return {
            "in_channels": codec.channels,
            "out_channels": codec.channels,
            "patch_size": 1,
            "sample_size": config.sample_size // config.patch_size,
        }
