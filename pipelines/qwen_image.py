"""Qwen-Image: an autoencoder of videos, prompts of any length with a mask, guidance that keeps norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.latents.codec import pack, unpack
from diffalign.pipelines.base import JOINT_ATTENTION, TextToImageModel
from diffalign.types import PromptEmbeds


class QwenImageModel(TextToImageModel):
    """QwenImagePipeline behind the common interface, with unpacked latents of one frame.

    The guidance scale is the stock pipeline's `true_cfg_scale`.
    """

    family = "qwen_image"
    lora_targets = JOINT_ATTENTION
    patch_size = 2
    max_sequence_length = 1024
    latents_affine = "channels"

    @classmethod
    def default_guidance(cls, parameters: Mapping[str, Any]) -> float | None:
        """Return the default of the stock pipeline's scale."""
        return float(parameters["true_cfg_scale"].default)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embed B prompts, padded to the longest."""
        embeds, mask = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        # the pipeline leaves out a mask that excludes nothing, and a longer prompt may join these later
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return PromptEmbeds(embeds, prompt_attention_mask=mask)

    def guided(self, uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        """Return the guided prediction, whose tokens have the norms of the conditional one's."""
        height, width = cond.shape[-2:]
        plain = pack(cond, self.patch_size)
        tokens = pack(super().guided(uncond, cond, guidance_scale), self.patch_size)
        norms = [torch.norm(part, dim=-1, keepdim=True) for part in (plain, tokens)]
        return unpack(tokens * (norms[0] / norms[1]), self.patch_size, height=height, width=width)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        b, _, h, w = noisy_latents.shape
        text, mask = embeds.prompt_embeds, embeds.prompt_attention_mask
        if mask is not None:
            lengths = embeds.lengths
            longest, shortest = max(lengths), min(lengths)
            text = text[:, :longest]
            mask = mask[:, :longest] if shortest < longest else None
        tokens = self.denoiser(
            hidden_states=pack(noisy_latents, self.patch_size),
            # the pipeline rounds time to the dtype of the latents before it scales it
            timestep=timesteps.to(noisy_latents.dtype) / self.noise.num_train_timesteps,
            guidance=None,
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=text,
            img_shapes=[[(1, h // self.patch_size, w // self.patch_size)]] * b,
            return_dict=False,
        )[0]
        return unpack(tokens, self.patch_size, height=h, width=w)

    def prompt_shape(self) -> tuple[int, int, int]:
        return self.max_sequence_length, self.denoiser.config.joint_attention_dim, 0

    @property
    def latent_channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels // self.patch_size**2

    def scheduler_kwargs(self, num_inference_steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)}
