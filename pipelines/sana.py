"""SANA: linear attention on deep-compressed latents, Gemma's tokens with a mask behind a written instruction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from diffalign.latents.codec import LatentCodec
from diffalign.latents.move import Ends
from diffalign.pipelines.base import TextToImageModel
from diffalign.types import PromptEmbeds

# what the stock pipeline writes before every prompt (Xie et al. 2024, section 3.1), of the diffusers that is installed
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
STOCK_STEP = 32
"""Pixels: the stock pipeline refuses sides that are no multiples of it, whatever the autoencoder."""


class SanaModel(TextToImageModel):
    """`SanaPipeline` behind the common interface, without its binning of resolutions: a size is made as asked for."""

    family = "sana"
    ends = Ends("patch_embed.proj", "proj_out")
    deep_pipeline = "DCGenSanaPipeline"
    # Both attentions of a block whole, as the released AWM trains SD3's. diffusers' script for LoRA on SANA leaves out
    # the output; `lora.targets: [to_q, to_k, to_v]` is that.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    max_sequence_length = 300
    latents_dtype = torch.float32
    latents_affine = "scale"

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.denoiser.config.sample_size * self.pipeline.vae_scale_factor
        return self._default_size or (side, side)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The instruction stands before every prompt but the empty one, which is what the stock pipeline guides away
        from."""
        said = [i for i, prompt in enumerate(prompts) if prompt]
        empty = [i for i, prompt in enumerate(prompts) if not prompt]
        parts = [
            self._encode([prompts[i] for i in rows], instruction)
            for rows, instruction in ((said, INSTRUCTION.default), (empty, None))
            if rows
        ]
        return PromptEmbeds.cat(parts)[torch.tensor([*said, *empty]).argsort()]

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> PromptEmbeds:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return PromptEmbeds(embeds, prompt_attention_mask=mask)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Float32, as the stock pipeline steps, whatever the denoiser's dtype."""
        dtype = self.denoiser.dtype
        return self.denoiser(
            hidden_states=noisy_latents.to(dtype),
            encoder_hidden_states=embeds.prompt_embeds.to(dtype),
            encoder_attention_mask=embeds.prompt_attention_mask,
            timestep=timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0].float()

    def prompt_shape(self) -> tuple[int, int, int]:
        return self.max_sequence_length, self.denoiser.config.caption_channels, 0

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    @property
    def granularity(self) -> int:
        return math.lcm(STOCK_STEP, super().granularity)

    @property
    def patch_size(self) -> int:  # type: ignore[override]
        return int(self.denoiser.config.patch_size)

    def moved_config(self, codec: LatentCodec, ratio: int) -> dict[str, Any]:
        side = self.denoiser.config.sample_size // self.denoiser.config.patch_size
        return {
            "in_channels": codec.channels,
            "out_channels": codec.channels,
            "patch_size": 1,
            "sample_size": side // ratio,
        }
