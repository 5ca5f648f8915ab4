"""Stable Diffusion 1.x and 2.x: a U-Net on a variance-preserving path, one text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.diffusion.paths import VariancePreserving
from diffalign.pipelines.base import TextToImageModel
from diffalign.types import PromptEmbeds


class SDModel(TextToImageModel):
    """StableDiffusionPipeline behind the common interface."""

    family = "sd"
    denoiser_part = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    latents_affine = "scale"

    def __init__(self, pipeline: Any, **kwargs: Any) -> None:
        super().__init__(pipeline, **kwargs)
        tokens = pipeline.tokenizer.model_max_length
        if kwargs.get("max_sequence_length") not in (None, tokens):
            raise UsageError(
                f"model.max_sequence_length: prompts of {self.family} have {tokens} tokens"
            )
        self.max_sequence_length = tokens

    @classmethod
    def path_of(cls, scheduler: Any) -> VariancePreserving:
        """Return the variance-preserving path of the scheduler's noise schedule.

        Raises:
            UsageError: the scheduler has no such schedule, or another kind of prediction.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        predicted = scheduler.config.get("prediction_type", "epsilon")
        if table is None:
            problem = "has no noise schedule of Stable Diffusion (alphas_cumprod)"
        elif predicted not in ("epsilon", "v_prediction"):
            problem = f"has prediction_type {predicted!r}, and only epsilon and v_prediction are supported"
        else:
            return VariancePreserving(table, predicted)
        raise UsageError(
            f"scheduler {type(scheduler).__name__} {problem}; put another into the pipeline's folder, such as "
            "EulerDiscreteScheduler or DDIMScheduler with the settings that the model was trained with"
        )

    @property
    def stock_side(self) -> int:
        return int(self.denoiser.config.sample_size * self.pipeline.vae_scale_factor)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, 1, do_classifier_free_guidance=False
        )
        return PromptEmbeds(embeds)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        prediction: Tensor = self.denoiser(
            noisy_latents,
            timesteps,
            encoder_hidden_states=embeds.prompt_embeds,
            return_dict=False,
        )[0]
        return prediction

    def prompt_shape(self) -> tuple[int, int, int]:
        return self.max_sequence_length, self.denoiser.config.cross_attention_dim, 0

    @property
    def latent_channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels
