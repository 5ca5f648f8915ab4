"""Stable Diffusion XL: two text encoders, and image sizes as a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.pipelines.sd import SDModel
from diffalign.types import PromptEmbeds


class SDXLModel(SDModel):
    """StableDiffusionXLPipeline behind the common interface."""

    family = "sdxl"
    takes_time_ids = True
    latents_affine = "statistics"
    upcasts_vae = True

    @classmethod
    def is_student(
        cls, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any], index: Mapping[str, Any]
    ) -> bool:
        """Return True for the scheduler of SDXL Turbo."""
        name, spacing = scheduler.get("_class_name"), scheduler.get("timestep_spacing")
        return (name, spacing) == ("EulerAncestralDiscreteScheduler", "trailing")

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embed B prompts; the empty prompt is zeros if the pipeline says so.

        The pipeline's setting is `force_zeros_for_empty_prompt`, with which SDXL was trained.
        """
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not p for p in prompts], device=embeds.device)
            embeds = embeds.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return PromptEmbeds(embeds, pooled)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Return the denoiser's prediction (B, C, H, W).

        Embeddings without `time_ids` are those of images that were neither cropped nor resized.
        """
        time_ids = embeds.time_ids
        if time_ids is None:
            scale = self.pipeline.vae_scale_factor
            height, width = (side * scale for side in noisy_latents.shape[-2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)
            time_ids = time_ids.expand(len(noisy_latents), -1)
        condition = {
            "text_embeds": embeds.pooled_prompt_embeds,
            "time_ids": time_ids.to(embeds.prompt_embeds.dtype),
        }
        prediction: Tensor = self.denoiser(
            noisy_latents,
            timesteps,
            encoder_hidden_states=embeds.prompt_embeds,
            added_cond_kwargs=condition,
            return_dict=False,
        )[0]
        return prediction

    def prompt_shape(self) -> tuple[int, int, int]:
        tokens, width, _ = super().prompt_shape()
        return tokens, width, self.pipeline.text_encoder_2.config.projection_dim
