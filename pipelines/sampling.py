"""From prompts to images with a family's own scheduler: what the stock pipeline does, in batches, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffalign.pipelines.base import TextToImageModel
from diffalign.precision import compute
from diffalign.types import PromptEmbeds

Generators = torch.Generator | Sequence[torch.Generator] | None
Step = Callable[[int, Tensor, Tensor, Any, Generators], Tensor]
"""(number of the step, model_pred, latents, scheduler, generator) to the next latents."""


def initial_latents(
    model: TextToImageModel,
    n: int,
    *,
    height: int,
    width: int,
    generator: Generators,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(n, C, H, W) standard normal noise, drawn as the stock pipeline draws it (one generator, or one an image)."""
    shape = (n, *model.latent_shape(height, width))
    generators = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(shape, generator=generators, device=model.device, dtype=dtype)


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
) -> Tensor:
    """Clean latents (B, C, H, W) for B prompts. With the same generator, the stock pipeline's image for image.

    `guidance_scale` None or 1 means no classifier-free guidance (FLUX: its default guidance embedding). `step` takes
    the place of the scheduler's own.
    """
    height, width = height or model.default_size[0], width or model.default_size[1]
    if latents is None:
        latents = initial_latents(
            model,
            len(embeds),
            height=height,
            width=width,
            generator=generator,
            dtype=embeds.prompt_embeds.dtype,
        )
    scheduler = model.scheduler_at(num_inference_steps, height=height, width=width)
    # schedulers of U-Nets may hold latents in other units than the denoiser reads
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    to_input = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for i, t in enumerate(scheduler.timesteps):
        model_pred = model.predict(
            to_input(latents, t),
            t.expand(len(embeds)),
            embeds,
            guidance_scale=guidance_scale,
            negative_embeds=negative_embeds,
        )
        if step is None:
            latents = scheduler.step(model_pred, t, latents, return_dict=False)[0]
        else:
            latents = step(i, model_pred, latents, scheduler, generator)
    return latents


class EmbedCache:
    """Prompt embeddings, each prompt encoded once as long as it stays among the `size` most recent; kept on the CPU."""

    def __init__(self, model: TextToImageModel, *, size: int = 4096) -> None:
        self.model = model
        self.size = size
        self._store: dict[str, PromptEmbeds] = {}

    def __call__(self, texts: Sequence[str], *, batch_size: int = 64) -> PromptEmbeds:
        new = [t for t in dict.fromkeys(texts) if t not in self._store]
        for start in range(0, len(new), batch_size):
            part = new[start : start + batch_size]
            embeds = self.model.encode_prompt(part).to("cpu")
            self._store |= {text: embeds[i : i + 1] for i, text in enumerate(part)}
        rows = []
        for text in texts:
            self._store[text] = self._store.pop(text)  # most recent last
            rows.append(self._store[text])
        while len(self._store) > max(self.size, len(texts)):
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
    """Clean latents (B, C, H, W) and images (B, 3, H, W) uint8 on the CPU; image i depends on its seed alone.

    `on_images` gets the images of each micro-batch, and their place among all, as soon as they are there.
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
            images.append(model.decode(clean).cpu())
        latents.append(clean)
        if on_images is not None:
            on_images(part, images[-1])
    return torch.cat(latents), torch.cat(images)
