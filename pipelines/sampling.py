"""Sampling of images like the stock pipeline, in batches, with a seed per image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffalign.core.precision import compute
from diffalign.pipelines.base import TextToImageModel
from diffalign.types import PromptEmbeds

Generators = torch.Generator | Sequence[torch.Generator] | None
Step = Callable[[int, Tensor, Tensor, Any, Generators], Tensor]
"""Function (number of the step, model_pred, latents, scheduler, generator) -> next latents."""


def initial_latents(
    model: TextToImageModel,
    n: int,
    *,
    height: int,
    width: int,
    generator: Generators,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normal noise (n, C, H, W), sampled like the stock pipeline does.

    Args:
        generator: one generator for all images, or one per image.
    """
    shape = (n, *model.latent_shape(height, width))
    generators = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(shape, generator=generators, device=model.device, dtype=dtype)


def scheduler_step(
    i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Generators
) -> Tensor:
    """Take the scheduler's step, with the generator if the step accepts one."""
    # without the generator, a stochastic step would use torch's, and images would not depend on their seed only
    options: dict[str, Any] = dict(step_options(scheduler))
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    t = scheduler.timesteps[i]
    return scheduler.step(model_pred, t, latents, return_dict=False, **options)[0]


def scaled(scheduler: Any, i: int, latents: Tensor) -> Tensor:
    """Return latents in the units of the denoiser's input at step `i`.

    Some schedulers hold latents in other units, and require this call before every step.
    """
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    return scheduler.scale_model_input(latents, scheduler.timesteps[i])


def step_options(scheduler: Any) -> dict[str, float]:
    """Return `eta=0` for schedulers that accept it."""
    # stock pipelines pass it to every step; TCD would otherwise add noise
    return {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}


@dataclass
class Sampling:
    """Settings of sampling one batch, which do not change between steps.

    A `guidance_scale` of None or 1 means no classifier-free guidance (for FLUX its default guidance embedding). Above 1
    `negative_embeds` has B rows. Height and width are in pixels.
    """

    model: TextToImageModel
    embeds: PromptEmbeds
    num_inference_steps: int
    height: int
    width: int
    guidance_scale: float | None = None
    negative_embeds: PromptEmbeds | None = None

    def __post_init__(self) -> None:
        self.scheduler = self.model.scheduler_at(
            self.num_inference_steps, height=self.height, width=self.width
        )

    def start(self, generator: Generators = None, latents: Tensor | None = None) -> Tensor:
        """Return initial latents (B, C, H, W) in the scheduler's units.

        Schedulers of U-Nets may hold latents in other units than the denoiser reads.
        """
        if latents is None:
            latents = initial_latents(
                self.model,
                len(self.embeds),
                height=self.height,
                width=self.width,
                generator=generator,
                dtype=self.model.latents_dtype or self.embeds.prompt_embeds.dtype,
            )
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
            guidance_scale=self.guidance_scale,
            negative_embeds=self.negative_embeds,
        )

    def draw(
        self,
        generator: Generators = None,
        *,
        latents: Tensor | None = None,
        step: Step | None = None,
        first_pred: Tensor | None = None,
    ) -> Tensor:
        """Return clean latents (B, C, H, W); see `sample` for the arguments."""
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


@torch.no_grad()
def sample(
    model: TextToImageModel,
    embeds: PromptEmbeds,
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    negative_embeds: PromptEmbeds | None = None,
    height: int | None = None,
    width: int | None = None,
    generator: Generators = None,
    latents: Tensor | None = None,
    step: Step | None = None,
    first_pred: Tensor | None = None,
) -> Tensor:
    """Return clean latents (B, C, H, W) for B prompts.

    They equal those of the stock pipeline with the same generator.

    Args:
        guidance_scale: see `Sampling`.
        step: replaces the scheduler's step.
        first_pred: (B, C, H, W), the prediction at the first step, if it is already computed.
    """
    size = height or model.default_size[0], width or model.default_size[1]
    run = Sampling(model, embeds, num_inference_steps, *size, guidance_scale, negative_embeds)
    return run.draw(generator, latents=latents, step=step, first_pred=first_pred)


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
            self._store[text] = self.model.encode_prompt([text]).to("cpu") if row is None else row
            rows.append(self._store[text])
        while len(self._store) > max(self.size, len(set(texts))):
            del self._store[next(iter(self._store))]
        return PromptEmbeds.cat(rows).to(self.model.device)


def generate(
    model: TextToImageModel,
    embeds: PromptEmbeds,
    prompt_index: Tensor,
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float | None,
    negative_embeds: PromptEmbeds | None = None,
    height: int | None = None,
    width: int | None = None,
    micro_batch_size: int = 64,
    mixed_precision: str = "bf16",
    step: Step | None = None,
    on_images: Callable[[slice, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Generate clean latents and images for B prompts.

    Image i depends on its own seed only. The latents of an image are NaN if its pixels are not all finite.

    Args:
        prompt_index: (B,), row of each image's prompt in `embeds`.
        seeds: seeds of the B images.
        on_images: receives the images of each micro-batch and their slice of the batch when they are generated.

    Returns:
        Latents (B, C, H, W), and images (B, 3, H, W) uint8 on the CPU.
    """
    latents, images = [], []
    for start in range(0, len(seeds), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        generators = [torch.Generator().manual_seed(s) for s in seeds[part]]
        rows = prompt_index[part].to(embeds.prompt_embeds.device)
        negative = None
        if negative_embeds is not None:
            negative = negative_embeds.repeat_first(len(rows))
        with compute(model.device, mixed_precision):
            clean = sample(
                model,
                embeds[rows],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_embeds=negative,
                height=height,
                width=width,
                generator=generators,
                step=step,
            )
            decoded, finite = model.decode_checked(clean)
            # 8-bit images cannot show values that are not finite
            clean[~finite] = torch.nan
            images.append(decoded.cpu())
        latents.append(clean)
        if on_images is not None:
            on_images(part, images[-1])
    return torch.cat(latents), torch.cat(images)
