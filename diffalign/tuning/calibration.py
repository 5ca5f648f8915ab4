"""Calibration: statistics of layers' inputs, recorded while a model samples prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core.errors import UsageError
from diffalign.core.precision import attention
from diffalign.core.seeds import EVALUATION, stream
from diffalign.data.prompts import Prompt
from diffalign.evaluation.score import image_seeds
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.sampling import Sampling, generators_of, scheduler_step
from diffalign.quantization.lowrank import collect_input_scales
from diffalign.quantization.moments import MEMORY, Moments, collect_moments
from diffalign.quantization.observer import ActivationScales, InputObserver
from diffalign.quantization.packed import MIN_WEIGHTS, SKIP, packable

MAX_TIMESTEPS = 16
"""Largest number of timesteps that get scales of their own."""
Before = Callable[[range, int, Sampling], None]
After = Callable[[range, int, Sampling, Tensor, Tensor], None]


@dataclass
class Calibration:
    """Calibration of a model on images of prompts.

    The images are sampled by `drawing`, so a few-step model is calibrated on all its timesteps.

    Raises:
        UsageError: there is no prompt.
    """

    model: TextToImageModel
    prompts: Sequence[Prompt]
    drawing: Drawing

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("prompts: there is no prompt to calibrate with. Give at least one.")

    @torch.no_grad()
    def run(self, before: Before | None = None, *, after: After | None = None) -> None:
        """Sample all prompts once, in batches of `micro_batch_size`.

        Args:
            before: is called before every prediction with the numbers of the batch's images, the step and the batch.
            after: is called after every prediction with the same, the latents and the prediction (B, C, H, W).
        """
        sampler = Sampler(self.model, self.drawing)
        step = sampler.step() or scheduler_step
        images = range(len(self.prompts))
        seeds = image_seeds(self.drawing, len(images))
        with attention(self.model.device):
            for part in self.drawing.batches(len(images)):
                run = sampler.batch([p.text for p in self.prompts[part]])
                generators = generators_of(seeds[part])
                latents = run.start(generators)
                for i in range(len(run.scheduler.timesteps)):
                    if before is not None:
                        before(images[part], i, run)
                    model_pred = run.predict(i, latents)
                    if after is not None:
                        after(images[part], i, run, latents, model_pred)
                    latents = step(i, model_pred, latents, run.scheduler, generators)

    def images(self, count: int) -> Tensor:
        """Return images (N, 3, H, W) uint8 of the first prompts.

        Their noise is not that of `run`.
        """
        prompts = [p.text for p in self.prompts[:count]]
        # the seeds of `run` are the first ones
        seeds = image_seeds(self.drawing, len(self.prompts) + len(prompts))[len(self.prompts) :]
        return Sampler(self.model, self.drawing).images(prompts, seeds).images

    def input_scales(self) -> dict[str, Tensor]:
        """Return root mean squares (channels,) of layers' inputs, to which branches are fitted."""
        return collect_input_scales(self.model.denoiser, self.run)

    def moments(
        self, *, memory: int = MEMORY, skip: Sequence[str] = SKIP, min_weights: int = MIN_WEIGHTS
    ) -> Iterator[dict[str, Moments]]:
        """Yield second moments of the inputs of the layers that get packed, in parts.

        Args:
            memory: bytes of the moments of a part; all prompts are sampled once per part.
            skip: layers that are not packed, as in `packed.packable`.
            min_weights: size below which layers are not packed.

        Raises:
            UsageError: as in `moments.collect_moments`.
        """
        layers = packable(self.model.denoiser, skip=skip, min_weights=min_weights)
        return collect_moments(self.model.denoiser, layers, self.run, memory=memory)

    def activation_scales(self) -> ActivationScales:
        """Return scales for the inputs of the linear layers that get packed.

        Up to `MAX_TIMESTEPS` timesteps get scales of their own. With more timesteps a layer has one scale; each image
        then counts at the step nearest to a random timestep (`normal_timesteps`).

        Raises:
            UsageError: no linear layer is large enough.
        """
        layers = packable(self.model.denoiser)
        names = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        if not names:
            raise UsageError(
                f"backend=int8-static: no linear layer of this {self.model.family} model is large enough for integer "
                "products. Use int8."
            )
        few = self.drawing.num_inference_steps <= MAX_TIMESTEPS
        observer = InputObserver(self.model.denoiser, names, by_timestep=few)
        timesteps = normal_timesteps(len(self.prompts), self.drawing.seed)

        def choose(numbers: range, i: int, run: Sampling) -> None:
            observer.rows = rows_at(i, run.scheduler, timesteps[numbers.start : numbers.stop])
            # Guidance doubles the batch.
            if run.negative_embeds is not None:
                observer.rows = torch.cat([observer.rows, observer.rows + len(numbers)])

        with observer.watching():
            self.run(None if few else choose)
        return observer.scales()


def normal_timesteps(n: int, seed: int, *, mean: float = 0.4, std: float = 0.4) -> Tensor:
    """Draw timesteps (n,) in 0..1 from a truncated normal distribution; 1 is noise.

    PTQ4DM clamps the distribution instead and so places a sixth of all images at the end of the trajectory.
    """
    generator = torch.Generator().manual_seed(stream(EVALUATION, seed, n))
    low, high = ((bound - mean) / std / 2**0.5 for bound in (0.0, 1.0))
    uniform = torch.rand(n, generator=generator)
    low, high = math.erf(low), math.erf(high)
    return mean + std * 2**0.5 * torch.erfinv(low + (high - low) * uniform)


def rows_at(i: int, scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the rows whose timestep, in 0..1, is nearest to that of step `i`.

    The comparison is by timestep and not by step number: PTQ4DM's code pairs the two in reverse, and so calibrates on
    the mirrored distribution.
    """
    scaled = scheduler.timesteps.float().cpu() / scheduler.config.num_train_timesteps
    nearest: Tensor = (timesteps[:, None] - scaled[None]).abs().argmin(1)
    return nearest.eq(i).nonzero().flatten()
