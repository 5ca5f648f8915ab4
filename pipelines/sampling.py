"""Sampling of one batch of images like the stock pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.types import PromptEmbeds, Size

Generators = torch.Generator | Sequence[torch.Generator] | None
Step = Callable[[int, Tensor, Tensor, Any, Generators], Tensor]
"""Function (number of the step, model_pred, latents, scheduler, generator) -> next latents."""


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def scheduler_step(
    i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Generators
) -> Tensor:
    """Take the scheduler's step, with the generator if the step accepts one."""
    # without the generator, a stochastic step would use torch's, and images would not depend on their seed only
    options: dict[str, Any] = dict(step_options(scheduler))
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    t = scheduler.timesteps[i]
    output: Tensor = scheduler.step(model_pred, t, latents, return_dict=False, **options)[0]
    return output


def scaled(scheduler: Any, i: int, latents: Tensor) -> Tensor:
    """Return latents in the units of the denoiser's input at step `i`.

    Some schedulers hold latents in other units, and require this call before every step.
    """
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    model_input: Tensor = scheduler.scale_model_input(latents, scheduler.timesteps[i])
    return model_input


def step_options(scheduler: Any) -> dict[str, float]:
    """Return `eta=0` for schedulers that accept it."""
    # stock pipelines pass it to every step; TCD would otherwise add noise
    return {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}


@dataclass
class Sampling:
    """Sampling of one batch of B prompts.

    With classifier-free guidance `negative_embeds` has B rows. `Sampler.batch` provides them.
    """

    model: TextToImageModel
    embeds: PromptEmbeds
    drawing: Drawing
    negative_embeds: PromptEmbeds | None = None

    @cached_property
    def size(self) -> Size:
        """(height, width) of the images in pixels."""
        return self.model.image_size(self.drawing.size)

    @cached_property
    def scheduler(self) -> Any:
        """Copy of the pipeline's scheduler, with the timesteps of this batch."""
        return self.model.scheduler_at(self.drawing.num_inference_steps, self.size)

    def noise(self, generator: Generators, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return standard normal noise (B, C, H, W), sampled like the stock pipeline does.

        Args:
            generator: one generator for all images, or one per image.
            dtype: dtype of the noise; None for that of the stock pipeline.
        """
        shape = (len(self.embeds), *self.model.latent_shape(self.size))
        generators = list(generator) if isinstance(generator, Sequence) else generator
        dtype = dtype or self.model.latents_dtype or self.embeds.prompt_embeds.dtype
        device = self.model.device
        noise: Tensor = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
        return noise

    def start(self, generator: Generators = None, latents: Tensor | None = None) -> Tensor:
        """Return initial latents (B, C, H, W) in the scheduler's units.

        Schedulers of U-Nets may hold latents in other units than the denoiser reads.
        """
        if latents is None:
            latents = self.noise(generator)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def scaled(self, i: int, latents: Tensor) -> Tensor:
        """Return latents in the units of the denoiser's input at step `i`."""
        return scaled(self.scheduler, i, latents)

    def predict(self, i: int, latents: Tensor) -> Tensor:
        """Return the model's prediction (B, C, H, W) at step `i`."""
        return self.model.predict(
            self.scaled(i, latents),
            self.scheduler.timesteps[i].expand(len(self.embeds)),
            self.embeds,
            guidance_scale=self.drawing.guidance_scale,
            negative_embeds=self.negative_embeds,
        )

    @torch.no_grad()
    def draw(
        self,
        generator: Generators = None,
        *,
        latents: Tensor | None = None,
        step: Step | None = None,
        first_pred: Tensor | None = None,
    ) -> Tensor:
        """Return clean latents (B, C, H, W) for the prompts.

        They equal those of the stock pipeline with the same generator.

        Args:
            latents: initial noise (B, C, H, W), which replaces the generator's.
            step: replaces the scheduler's step.
            first_pred: (B, C, H, W), the prediction at the first step, if it is already computed.
        """
        latents = self.start(generator, latents)
        step = step or scheduler_step
        for i in range(len(self.scheduler.timesteps)):
            if i == 0 and first_pred is not None:
                self.scaled(i, latents)
                model_pred = first_pred
            else:
                model_pred = self.predict(i, latents)
            latents = step(i, model_pred, latents, self.scheduler, generator)
        return latents


class EmbedCache:
    """Cache of prompt embeddings on the CPU: the `size` most recent prompts, each encoded once.

    A prompt is encoded alone. In a batch its embedding's last bits would depend on the batch, thus on which prompts
    the cache happened to hold, and a resumed run, whose cache is empty, would differ from an uninterrupted one.
    """

    def __init__(self, model: TextToImageModel, *, size: int = 4096) -> None:
        self.model = model
        self.size = size
        self._store: dict[str, PromptEmbeds] = {}

    def __call__(self, texts: Sequence[str]) -> PromptEmbeds:
        """Return the embeddings of the prompts, one row each, on the model's device."""
        rows = []
        for text in texts:
            row = self._store.pop(text, None)
            # the most recent prompt is last
            self._store[text] = self._encoded(text) if row is None else row
            rows.append(self._store[text])
        while len(self._store) > max(self.size, len(set(texts))):
            del self._store[next(iter(self._store))]
        return PromptEmbeds.cat(rows).to(self.model.device)

    def _encoded(self, text: str) -> PromptEmbeds:
        """Return the embedding of a prompt on the CPU, if possible from the folder."""
        folder = self.model.embed_folder
        embeds = None if folder is None else folder.read(text)
        if embeds is not None:
            return embeds
        embeds = self.model.encode_prompt([text]).to("cpu")
        if folder is not None:
            folder.write(text, embeds)
        return embeds
