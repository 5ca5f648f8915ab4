"""Z-Image: prompts of any length, reversed time, and a guidance scale of zero for none in the stock pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.pipelines.base import TextToImageModel
from diffalign.types import PromptEmbeds


class ZImageModel(TextToImageModel):
    """ZImagePipeline behind the common interface.

    The stock pipeline's guidance scale is 0 for no guidance. Here it is the usual one, which is larger by one. The
    denoiser counts time from noise to image and predicts the opposite velocity; `forward` turns both around.
    """

    family = "z_image"
    lora_targets = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
    )
    patch_size = 2
    max_sequence_length = 512
    latents_dtype = torch.float32
    prediction_sign = -1

    @classmethod
    def is_student(
        cls, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any], index: Mapping[str, Any]
    ) -> bool:
        """Return True for Z-Image-Turbo by its name; its configurations are those of Z-Image."""
        return "turbo" in str(index.get("_name_or_path")).lower()

    @classmethod
    def default_guidance(cls, parameters: Mapping[str, Any]) -> float | None:
        """Return the usual scale for the default of the stock pipeline."""
        return 1 + float(parameters["guidance_scale"].default)

    @property
    def stock_side(self) -> int:
        # the stock pipeline's default, which no configuration holds
        return 1024

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embed B prompts, padded to the longest."""
        rows, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return PromptEmbeds.cat(
            [
                PromptEmbeds(row[None], prompt_attention_mask=row.new_ones(1, len(row)))
                for row in rows
            ]
        )

    def guided(self, uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        """Return the guided prediction, in the stock pipeline's order of operations."""
        return cond + (guidance_scale - 1) * (cond - uncond)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Return the velocity (B, C, H, W) in float32."""
        # the stock pipeline takes its steps in float32 for every dtype of the denoiser
        dtype, total = self.denoiser.dtype, self.noise.num_train_timesteps
        texts = zip(embeds.prompt_embeds.to(dtype), embeds.lengths, strict=True)
        images = self.denoiser(
            list(noisy_latents.to(dtype).unsqueeze(2)),
            (total - timesteps) / total,
            [text[:length] for text, length in texts],
            return_dict=False,
        )[0]
        return -torch.stack([image.float() for image in images]).squeeze(2)

    def prompt_shape(self) -> tuple[int, int, int]:
        return self.max_sequence_length, self.denoiser.config.cap_feat_dim, 0

    @property
    def latent_channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels

    def scheduler_kwargs(self, num_inference_steps: int) -> dict[str, Any]:
        grid = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return {"sigmas": grid.tolist()}
