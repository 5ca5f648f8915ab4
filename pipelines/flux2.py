"""FLUX.2 [dev] and [klein]: patches folded into latents, batch-normalised, hidden states of a language model as text.

The model [dev] embeds its guidance. The bases of [klein] have classifier-free guidance, and its distilled models none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from diffalign.latents.codec import pack, position_ids, unpack
from diffalign.pipelines.base import JOINT_ATTENTION, TextToImageModel
from diffalign.types import PromptEmbeds, Size

DEFAULT_GUIDANCE = 4.0
FOLD = 2
"""Side of the patches of the autoencoder's latents that are folded into channels."""


class Flux2Model(TextToImageModel):
    """Flux2Pipeline or Flux2KleinPipeline behind the common interface.

    Latents (B, C, H, W) are the denoiser's: each position is a token, and covers two latents of the autoencoder per
    side.
    """

    family = "flux2"
    # the joint blocks, and both projections of the single blocks, which are most of the model
    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")
    max_sequence_length = 512
    latents_affine = "batch_norm"
    embedded_guidance = DEFAULT_GUIDANCE

    @classmethod
    def is_student(
        cls, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any], index: Mapping[str, Any]
    ) -> bool:
        """Return True for the distilled models of [klein], which say so themselves."""
        return bool(index.get("is_distilled"))

    @property
    def guidance_is_embedded(self) -> bool:  # type: ignore[override]
        return bool(self.denoiser.config.guidance_embeds)

    def costs_a_forward(self, guidance_scale: float | None) -> bool:
        """Return True if this guidance needs a second forward; a distilled model has none."""
        return not self.is_distilled and super().costs_a_forward(guidance_scale)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        return PromptEmbeds(embeds)

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        *,
        guidance_scale: float | Tensor | None = None,
        negative_embeds: PromptEmbeds | None = None,
    ) -> Tensor:
        """Return the prediction (B, C, H, W), with the guidance of the model's kind.

        Args:
            guidance_scale: for [dev] one number or (B,), an input of the denoiser, None for 4.0; for a base of [klein]
                the scale of classifier-free guidance; ignored by the distilled models.
            negative_embeds: B rows, for a base of [klein] with guidance above 1.
        """
        if self.guidance_is_embedded:
            return self.forward(noisy_latents, timesteps, embeds, guidance_scale=guidance_scale)
        assert not isinstance(guidance_scale, Tensor)
        return super().predict(
            noisy_latents,
            timesteps,
            embeds,
            guidance_scale=None if self.is_distilled else guidance_scale,
            negative_embeds=negative_embeds,
        )

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        *,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        b, _, h, w = noisy_latents.shape
        device, text = noisy_latents.device, embeds.prompt_embeds
        guidance = None
        if self.guidance_is_embedded:
            scale = self.embedded_guidance if guidance_scale is None else guidance_scale
            guidance = torch.as_tensor(scale, device=device, dtype=torch.float32).expand(b)
        tokens = self.denoiser(
            hidden_states=pack(noisy_latents, 1),
            # the pipeline rounds time to the dtype of the latents before it scales it
            timestep=timesteps.to(noisy_latents.dtype) / self.noise.num_train_timesteps,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=text_ids(text.shape[1]).to(device),
            img_ids=image_ids(h, w).to(device),
            return_dict=False,
        )[0]
        return unpack(tokens, 1, height=h, width=w)

    def prompt_shape(self) -> tuple[int, int, int]:
        return self.max_sequence_length, self.denoiser.config.joint_attention_dim, 0

    @property
    def latent_channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels

    @property
    def pixels_per_latent(self) -> int:
        return FOLD * super().pixels_per_latent

    def mu(self, size: Size, num_inference_steps: int) -> float:
        """Return `mu` of the schedule, which depends on the tokens and the number of steps."""
        mu: float = compute_empirical_mu(self.image_seq_len(size), num_inference_steps)
        return mu

    def scheduler_kwargs(self, num_inference_steps: int) -> dict[str, Any]:
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return {}
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)}


def image_ids(rows: int, columns: int) -> Tensor:
    """Return FLUX.2's position ids of an image, (rows * columns, 4).

    They are (time 0, row, column, token 0).
    """
    return torch.nn.functional.pad(position_ids(rows, columns), (0, 1))


def text_ids(tokens: int) -> Tensor:
    """Return FLUX.2's position ids (0, 0, 0, token) of a text, (tokens, 4)."""
    return torch.nn.functional.pad(torch.arange(tokens).float()[:, None], (3, 0))
