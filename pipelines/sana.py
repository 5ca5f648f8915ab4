"""SANA: linear attention on deep-compressed latents, with an instruction before prompts.

The text encoder is Gemma, whose tokens have a mask.
"""

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

# instruction that the stock pipeline of the installed diffusers puts before prompts (Xie et al. 2024, section 3.1)
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
STOCK_STEP = 32
"""Number of pixels that the stock pipeline requires sides to be multiples of."""


class SanaModel(TextToImageModel):
    """SanaPipeline behind the common interface, without its binning of resolutions.

    Images have exactly the requested size.
    """

    family = "sana"
    ends = Ends("patch_embed.proj", "proj_out")
    deep_pipeline = "DCGenSanaPipeline"
    # All projections of both attentions in a block, as AWM's release trains those of SD3. diffusers' LoRA script for
    # SANA leaves out the output projection, which is `lora.targets: [to_q, to_k, to_v]`.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    max_sequence_length = 300
    latents_dtype = torch.float32
    latents_affine = "scale"

    @property
    def stock_side(self) -> int:
        return int(self.denoiser.config.sample_size * self.pipeline.vae_scale_factor)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embed B prompts, with the instruction before every prompt that is not empty."""
        # the empty prompt is the stock pipeline's negative prompt, which has no instruction
        filled = [i for i, prompt in enumerate(prompts) if prompt]
        empty = [i for i, prompt in enumerate(prompts) if not prompt]
        parts = [
            self._encode([prompts[i] for i in rows], instruction)
            for rows, instruction in ((filled, INSTRUCTION.default), (empty, None))
            if rows
        ]
        return PromptEmbeds.cat(parts)[torch.tensor([*filled, *empty]).argsort()]

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
        """Return the denoiser's prediction (B, C, H, W) in float32."""
        # the stock pipeline takes its steps in float32 for every dtype of the denoiser
        dtype = self.denoiser.dtype
        prediction: Tensor = self.denoiser(
            hidden_states=noisy_latents.to(dtype),
            encoder_hidden_states=embeds.prompt_embeds.to(dtype),
            encoder_attention_mask=embeds.prompt_attention_mask,
            timestep=timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return prediction.float()

    def prompt_shape(self) -> tuple[int, int, int]:
        return self.max_sequence_length, self.denoiser.config.caption_channels, 0

    @property
    def latent_channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels

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
