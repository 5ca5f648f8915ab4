"""What a model in a new latent space is asked in training, and what it should say: one place for updates, validation
and the closed form of its last layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.algorithms.dcgen import dcgen_loss, guided
from diffalign.config import DCGenConfig
from diffalign.data.latent_cache import LatentBatch
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.pipelines.base import TextToImageModel
from diffalign.training.denoise import predict
from diffalign.types import PromptEmbeds


@dataclass(frozen=True)
class Question:
    """B noisy latents (B, C, h, w) at timesteps (B,), prompts of which some are empty, guidance scales (B,) or None,
    and the velocity (B, C, h, w) that is right."""

    noisy: Tensor
    timesteps: Tensor
    embeds: PromptEmbeds
    guidance_scale: Tensor | None
    target: Tensor


@dataclass
class Step:
    """Asks `model`; all that is random is a function of one seed an image.

    `null` is the embedding of the empty prompt (1 row), `size` that of the images in pixels.
    """

    model: TextToImageModel
    algorithm: DCGenConfig
    null: PromptEmbeds
    size: tuple[int, int]
    mixed_precision: str

    def ask(self, batch: LatentBatch, seeds: Sequence[int]) -> Question:
        """Noise, noise level, guidance scale and dropout of the prompt, by the seed of each image."""
        a, latents = self.algorithm, batch.latents
        numbers, noise = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            normal = torch.randn((), generator=generator)
            numbers.append(torch.cat([normal[None], torch.rand(2, generator=generator)]))
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        normal, scale, coin = torch.stack(numbers).unbind(1)
        sigmas = torch.sigmoid(a.sigma_mean + a.sigma_std * normal)
        sigmas = self.model.shifted(sigmas, height=self.size[0], width=self.size[1])
        assert isinstance(self.model.noise, RectifiedFlow)
        timesteps = self.model.noise.timesteps(sigmas).to(latents.device)
        noises = torch.stack(noise).to(latents.device)
        guidance = None
        if self.model.guidance_is_embedded:
            span = a.max_guidance - a.min_guidance
            guidance = (a.min_guidance + span * scale).to(latents.device)
        return Question(
            self.model.noise.add_noise(latents, noises, timesteps),
            timesteps,
            self._dropped(batch.embeds, coin < a.prompt_dropout),
            guidance,
            self.model.noise.target(latents, noises, timesteps),
        )

    def _dropped(self, embeds: PromptEmbeds, dropped: Tensor) -> PromptEmbeds:
        """Some rows replaced by the empty prompt."""
        both = PromptEmbeds.cat([self.null, embeds])
        rows = torch.where(dropped, 0, torch.arange(1, len(embeds) + 1))
        return both[rows.to(embeds.prompt_embeds.device)]

    def predict(self, question: Question) -> Tensor:
        """The model's velocity (B, C, h, w), at the guidance scales where it has such."""
        return self._forward(question, question.embeds, question.guidance_scale)

    @torch.no_grad()
    def null_predict(self, question: Question) -> Tensor | None:
        """That for the empty prompt at scale 1, where guidance is an input."""
        if question.guidance_scale is None:
            return None
        ones = torch.ones_like(question.guidance_scale)
        return self._forward(question, self.null.repeat_first(len(question.noisy)), ones)

    def _forward(self, question: Question, embeds: PromptEmbeds, guidance: Tensor | None) -> Tensor:
        return predict(
            self.model,
            question.noisy,
            question.timesteps,
            embeds,
            mixed_precision=self.mixed_precision,
            **({} if guidance is None else {"guidance_scale": guidance}),
        )

    def loss(self, question: Question) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,), and metrics (B,)."""
        null = self.null_predict(question)
        return dcgen_loss(
            self.predict(question),
            question.target,
            null_pred=null,
            guidance_scale=question.guidance_scale,
        )

    def features(
        self,
        batch: LatentBatch,
        seeds: Sequence[int],
        watch: Callable[[Callable[[], Tensor]], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What the head reads (B, N, D), guided as predictions are, and the targets (B, C, h, w). The constant that a
        bias multiplies stays 1 under guidance, so least squares on these is that of the loss."""
        question = self.ask(batch, seeds)
        found = watch(lambda: self.predict(question))
        if question.guidance_scale is not None:
            null = watch(lambda: self.null_predict(question))  # type: ignore[arg-type,return-value]
            found = guided(found, null, question.guidance_scale)
        return found, question.target
