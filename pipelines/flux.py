"""FLUX.1: packed latents, rotary position ids, embedded guidance, T5 and pooled CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.latents.codec import LatentCodec, pack, position_ids, unpack
from diffalign.latents.move import Ends
from diffalign.pipelines.base import JOINT_ATTENTION, TextToImageModel
from diffalign.types import PromptEmbeds

DEFAULT_GUIDANCE = 3.5


@torch.no_grad()
def fold_guidance(transformer: FluxTransformer2DModel, scale: float) -> FluxTransformer2DModel:
    """Return a copy of the transformer for one guidance scale, without the guidance input.

    FLUX.1-dev's layout becomes that of FLUX.1-schnell. The embedding of a constant scale is a constant, which is added
    to the bias of the time embedding.

    Raises:
        UsageError: the transformer has no guidance embedding.
    """
    if not transformer.config.guidance_embeds:
        raise UsageError("fold_guidance: this transformer has no guidance embedding to fold")
    embed = transformer.time_text_embed
    weight = embed.guidance_embedder.linear_1.weight
    guidance = torch.tensor([1000 * scale], dtype=torch.float32, device=weight.device)
    constant = embed.guidance_embedder(embed.time_proj(guidance).to(weight.dtype))[0]
    folded = type(transformer).from_config(transformer.config, guidance_embeds=False)
    state = {k: v for k, v in transformer.state_dict().items() if "guidance_embedder" not in k}
    bias = "time_text_embed.timestep_embedder.linear_2.bias"
    state[bias] = (state[bias].float() + constant.float()).to(state[bias].dtype)
    folded.to(dtype=weight.dtype, device=weight.device).load_state_dict(state)
    return folded.eval()


class FluxModel(TextToImageModel):
    """FluxPipeline behind the common interface, with unpacked latents."""

    family = "flux"
    lora_targets = JOINT_ATTENTION
    patch_size = 2
    ends = Ends("x_embedder", "proj_out")
    deep_pipeline = "DCGenFluxPipeline"
    max_sequence_length = 512
    long_tokenizer = "tokenizer_2"
    embedded_guidance = DEFAULT_GUIDANCE

    @property
    def stock_side(self) -> int:
        # the transformer names no size; the autoencoder's is that of FLUX.1's pipeline, 1024 pixels
        return super().stock_side if self.deep else int(self.pipeline.vae.config.sample_size)

    @classmethod
    def is_student(
        cls, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any], index: Mapping[str, Any]
    ) -> bool:
        """Return True for FLUX.1-schnell's layout, which has no guidance input."""
        return denoiser.get("guidance_embeds") is False

    @classmethod
    def default_sample_size(cls, pipeline: DiffusionPipeline) -> int | None:
        """Return the autoencoder's default side in latents."""
        # the stock class fixes 128 for every folder
        side = pipeline.vae.config.get("sample_size") if pipeline.vae is not None else None
        return side // pipeline.vae_scale_factor if isinstance(side, int) else None

    @property
    def guidance_is_embedded(self) -> bool:  # type: ignore[override]
        return bool(self.denoiser.config.guidance_embeds)

    def costs_a_forward(self, guidance_scale: float | None) -> bool:
        """Return False: guidance is embedded, or the model (FLUX.1-schnell) has none."""
        return False

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return PromptEmbeds(embeds, pooled)

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        *,
        guidance_scale: float | Tensor | None = None,
        negative_embeds: PromptEmbeds | None = None,
    ) -> Tensor:
        """Return the prediction (B, C, H, W), with guidance as an input of the denoiser.

        Args:
            guidance_scale: one number or (B,); None for 3.5, the default of the pipeline.
            negative_embeds: ignored, because guidance is distilled into the model.
        """
        del negative_embeds
        return self.forward(noisy_latents, timesteps, embeds, guidance_scale=guidance_scale)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        *,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        b, _, h, w = noisy_latents.shape
        device, dtype = noisy_latents.device, embeds.prompt_embeds.dtype
        guidance = None
        if self.guidance_is_embedded:
            scale = self.embedded_guidance if guidance_scale is None else guidance_scale
            guidance = torch.as_tensor(scale, device=device, dtype=torch.float32).expand(b)
        tokens = self.denoiser(
            hidden_states=pack(noisy_latents, self.patch_size),
            # the pipeline rounds time to the dtype of the latents before it scales it
            timestep=timesteps.to(noisy_latents.dtype) / self.noise.num_train_timesteps,
            guidance=guidance,
            pooled_projections=embeds.pooled_prompt_embeds,
            encoder_hidden_states=embeds.prompt_embeds,
            txt_ids=torch.zeros(embeds.prompt_embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=position_ids(h // self.patch_size, w // self.patch_size).to(device, dtype),
            return_dict=False,
        )[0]
        return unpack(tokens, self.patch_size, height=h, width=w)

    def prompt_shape(self) -> tuple[int, int, int]:
        config = self.denoiser.config
        return self.max_sequence_length, config.joint_attention_dim, config.pooled_projection_dim

    @property
    def latent_channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels // self.patch_size**2

    def moved_config(self, codec: LatentCodec, ratio: int) -> dict[str, Any]:
        """Return the changes for a codec's latents; the stock `patch_size` is 1 already."""
        return {"in_channels": codec.token_channels, "out_channels": None}

    def scheduler_kwargs(self, num_inference_steps: int) -> dict[str, Any]:
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return {}
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)}


class DCGenFluxModel(FluxModel):
    """DCGenFluxPipeline behind the common interface; each latent position is a token."""

    patch_size = 1

    @classmethod
    def default_sample_size(cls, pipeline: DiffusionPipeline) -> int | None:
        """Return None: the pipeline class reads the size from its folder."""
        return None
