"""Build denoising batches for DC-Gen, and compute their loss.

Updates, validation and the closed form of the last layer all use the batches of this module.
"""

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
from diffalign.types import DenoisingBatch, PromptEmbeds


@dataclass
class DenoisingTask:
    """Builder of denoising batches for `model`, and their loss.

    Every random choice for an image is a function of that image's seed. `null` is the embedding of the empty prompt
    (1 row), `size` the (height, width) of the images in pixels.
    """

    model: TextToImageModel
    algorithm: DCGenConfig
    null: PromptEmbeds
    size: tuple[int, int]
    mixed_precision: str

    def make_batch(self, images: LatentBatch, seeds: Sequence[int]) -> DenoisingBatch:
        """Build a denoising batch from clean latents.

        The seed of an image determines its noise, noise level, guidance scale and whether its prompt is dropped.
        """
        a, latents = self.algorithm, images.latents
        numbers, noise = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            normal = torch.randn((), generator=generator)
            numbers.append(torch.cat([normal[None], torch.rand(2, generator=generator)]))
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        normal, scale, coin = torch.stack(numbers).unbind(1)
        sigmas = torch.sigmoid(a.sigma_mean + a.sigma_std * normal)
        sigmas = self.model.shifted(sigmas, self.size)
        assert isinstance(self.model.noise, RectifiedFlow)
        timesteps = self.model.noise.timesteps(sigmas).to(latents.device)
        noises = torch.stack(noise).to(latents.device)
        guidance = None
        if self.model.guidance_is_embedded:
            span = a.max_guidance - a.min_guidance
            guidance = (a.min_guidance + span * scale).to(latents.device)
        return DenoisingBatch(
            self.model.noise.add_noise(latents, noises, timesteps),
            timesteps,
            self.model.noise.target(latents, noises, timesteps),
            self._dropped(images.embeds, coin < a.prompt_dropout),
            guidance,
        )

    def _dropped(self, embeds: PromptEmbeds, dropped: Tensor) -> PromptEmbeds:
        """Replace the prompts marked in `dropped` (B,) by the empty prompt."""
        both = PromptEmbeds.cat([self.null, embeds])
        rows = torch.where(dropped, 0, torch.arange(1, len(embeds) + 1))
        return both[rows.to(embeds.prompt_embeds.device)]

    def predict(self, batch: DenoisingBatch) -> Tensor:
        """Return the predicted velocity (B, C, h, w).

        The batch's guidance scales are used if guidance is an input of the model.
        """
        return self._forward(batch, batch.embeds, batch.guidance_scale)

    @torch.no_grad()
    def null_predict(self, batch: DenoisingBatch) -> Tensor | None:
        """Return the prediction (B, C, h, w) for the empty prompt at guidance scale 1.

        Return None if guidance is not an input of the model.
        """
        if batch.guidance_scale is None:
            return None
        ones = torch.ones_like(batch.guidance_scale)
        return self._forward(batch, self.null.repeat_first(len(batch.noisy)), ones)

    def _forward(
        self, batch: DenoisingBatch, embeds: PromptEmbeds, guidance: Tensor | None
    ) -> Tensor:
        return predict(
            self.model,
            batch.noisy,
            batch.timesteps,
            embeds,
            mixed_precision=self.mixed_precision,
            **({} if guidance is None else {"guidance_scale": guidance}),
        )

    def loss(self, batch: DenoisingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the DC-Gen loss (B,) and its metrics, (B,) each."""
        null = self.null_predict(batch)
        return dcgen_loss(
            self.predict(batch),
            batch.target,
            null_pred=null,
            guidance_scale=batch.guidance_scale,
        )

    def features(
        self,
        images: LatentBatch,
        seeds: Sequence[int],
        watch: Callable[[Callable[[], Tensor]], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs of the last layer, and the target velocities.

        Their shapes are (B, N, D) and (B, C, h, w). The inputs are combined by guidance like the loss combines
        predictions. Guidance leaves the constant input of the bias at 1, so least squares on these inputs minimises
        the same error as the loss.

        Args:
            watch: runs a forward and returns the inputs of the last layer in it, see `alignment.watched`.
        """
        batch = self.make_batch(images, seeds)
        features = watch(lambda: self.predict(batch))
        if batch.guidance_scale is not None:
            null = watch(lambda: self.null_predict(batch))  # type: ignore[arg-type,return-value]
            features = guided(features, null, batch.guidance_scale)
        return features, batch.target
