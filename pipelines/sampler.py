"""Sampler of a model's images: one owner of embeddings, guidance, solver and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.core.precision import compute
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampling import EmbedCache, Sampling, Step, generators_of
from diffalign.pipelines.solvers import solver_step
from diffalign.types import PromptEmbeds

OnImages = Callable[[slice, Tensor], None]
"""Callback of one batch: its rows among all images, and the images (B, 3, H, W) uint8 on the CPU."""

Start = Callable[[Sampling, Sequence[torch.Generator], slice], Tensor]
"""Function (batch, generators, rows of the batch) -> initial latents (B, C, H, W)."""


@dataclass(frozen=True)
class Samples:
    """Sampled images.

    Attributes:
        latents: (B, C, H, W). Those of an image are NaN if its pixels are not all finite.
        images: (B, 3, H, W) uint8 on the CPU.
    """

    latents: Tensor
    images: Tensor

    @property
    def finite(self) -> Tensor:
        """Mask (B,) on the CPU of the images whose latents are finite.

        Pixels of 8 bits do not show what was NaN.
        """
        return self.latents.isfinite().flatten(1).all(1).cpu()


class Sampler:
    """Sampler of a model's images with one set of settings.

    The scheduler is the pipeline's at the time of each batch.

    Attributes:
        embed: cache of prompt embeddings, which lives as long as the sampler.
        size: (height, width) of the images in pixels.
        guided: True if guidance needs a second forward with the negative prompt.
    """

    def __init__(self, model: TextToImageModel, drawing: Drawing) -> None:
        self.model, self.drawing = model, drawing
        self.embed = EmbedCache(model)
        self.size = model.image_size(drawing.size)
        self.guided = model.costs_a_forward(drawing.guidance_scale)

    def negatives(self, rows: int) -> PromptEmbeds | None:
        """Return the embeddings of the negative prompt, or None if guidance needs no second forward."""
        if not self.guided:
            return None
        return self.embed([self.drawing.negative_prompt]).repeat_first(rows)

    def batch(self, prompts: Sequence[str] | PromptEmbeds) -> Sampling:
        """Return the sampling of one batch of prompts or of their embeddings."""
        embeds = prompts if isinstance(prompts, PromptEmbeds) else self.embed(prompts)
        return Sampling(self.model, embeds, self.drawing, self.negatives(len(embeds)))

    def step(self) -> Step | None:
        """Return a new step of the solver, or None for the scheduler's.

        Raises:
            UsageError: the solver is not for models on this path.
        """
        return solver_step(self.drawing.solver, self.model.noise)

    def computing(self) -> AbstractContextManager[None]:
        """Return the context of the model's forwards, with the precision of the settings."""
        return compute(self.model.device, self.drawing.mixed_precision)

    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        step: Step | None = None,
        on_images: OnImages | None = None,
        start: Start | None = None,
    ) -> Samples:
        """Sample one image of each prompt.

        Image i depends on its own seed only.

        Args:
            seeds: seeds of the images.
            step: replaces the step of the settings' solver.
            on_images: receives the images of each batch when they are generated.
            start: returns the initial latents of each batch, in place of the seeds' noise.
        """
        step = step or self.step()
        parts: list[Samples] = []
        if self.model.resting is not None:
            # once for all batches, because the denoiser sends the text encoders away
            self.embed(prompts)
        for part in self.drawing.batches(len(seeds)):
            # the text encoders run in their own precision
            batch = self.batch(prompts[part])
            with self.computing():
                generators = generators_of(seeds[part])
                initial = None if start is None else start(batch, generators, part)
                latents = batch.draw(generators, latents=initial, step=step)
                images, finite = self.model.decode_checked(latents)
                # 8-bit images cannot show values that are not finite
                latents[~finite] = torch.nan
                parts.append(Samples(latents, images.cpu()))
            if on_images is not None:
                on_images(part, parts[-1].images)
        return Samples(torch.cat([p.latents for p in parts]), torch.cat([p.images for p in parts]))
