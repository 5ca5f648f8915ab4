"""State of one image between its steps."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from diffalign.acceleration.cache import History, Point, combine
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampling import Sampling, generators_of, scheduler_step
from diffalign.serving.modes import Mode
from diffalign.serving.tickets import Ticket
from diffalign.types import PromptEmbeds

Key = tuple[Any, ...]
"""Key of the images that can share a forward."""


def drawing_of(ticket: Ticket, mixed_precision: str) -> Drawing:
    """Return the settings with which a `Sampler` draws the same image."""
    settings = ticket.settings
    return Drawing(
        settings.num_inference_steps,
        settings.guidance_scale,
        settings.size,
        negative_prompt=settings.negative_prompt,
        seed=settings.seed,
        micro_batch_size=1,
        mixed_precision=mixed_precision,
    )


class Row:
    """Image in progress, with a scheduler, a generator and a cache of its own.

    The state begins with the object, so that nothing of an image that was given up reaches another.

    Attributes:
        step: number of the next step.
        computed: number of steps that the denoiser computed.
        skipped: number of steps that were extrapolated.
        round: number of the engine's round in which the image joined.
        previews: steps after which the image is shown.
    """

    def __init__(
        self,
        model: TextToImageModel,
        ticket: Ticket,
        mode: Mode,
        drawing: Drawing,
        *,
        embeds: PromptEmbeds,
        negative: PromptEmbeds | None,
        round_number: int = 0,
    ) -> None:
        self.model, self.ticket, self.mode = model, ticket, mode
        self.sampling = Sampling(model, embeds, drawing, negative)
        self.scheduler = self.sampling.scheduler
        self.embeds, self.negative = embeds, negative
        self.round = round_number
        self.started = time.monotonic()
        self.step = self.computed = self.skipped = 0
        self._generators = generators_of([ticket.settings.seed])
        self.latents = self.sampling.start(self._generators)
        self._schedule = mode.schedule_for(self.scheduler)
        self._history = History()
        self._difference: Tensor | None = None
        self._inputs = self.latents
        self.previews = preview_steps(self.steps, ticket.settings.partial_images)
        self.clean: Tensor | None = None
        """Clean latents that the last prediction implies, if the image is shown after it."""

    @property
    def steps(self) -> int:
        """Number of steps of the scheduler, which may take more than were asked for."""
        return len(self.scheduler.timesteps)

    @property
    def is_done(self) -> bool:
        """True after the last step."""
        return self.step >= self.steps

    @property
    def computes_both(self) -> bool:
        """True if the next forward has a negative and a positive half."""
        if self.negative is None:
            return False
        needs = self.mode.guidance == "reuse" and self._difference is None
        return needs or self.mode.guides(self.step, self.steps)

    @property
    def key(self) -> Key:
        """Key of the images that can share the next forward."""
        settings, embeds = self.ticket.settings, self.embeds
        shapes = tuple(
            None if part is None else tuple(part.shape[1:])
            for part in (embeds.prompt_embeds, embeds.pooled_prompt_embeds)
        )
        negative = self.negative if self.computes_both else None
        length = None if negative is None else tuple(negative.prompt_embeds.shape[1:])
        return settings.size, settings.lora, self.latents.dtype, shapes, length

    def begin(self) -> bool:
        """Prepare the next step, and return whether it needs a forward.

        A step that the cache extrapolates is taken here.
        """
        self._inputs = self.sampling.scaled(self.step, self.latents)
        schedule = self._schedule
        if schedule is None or not (slots := schedule.weights.get(self.step)):
            return True
        inputs = self._cache_inputs()
        points = self._history.of(0, inputs)
        if len(points) < len(slots[0].outputs):
            return True
        used = points[: len(slots[0].outputs)]
        self.skipped += 1
        # the cache is calibrated on the denoiser's own output
        self._take(combine(used, inputs, slots[0])[0] * self.model.prediction_sign)
        return False

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return the latents (1, C, H, W) and the timestep (1,) of the next forward."""
        return self._inputs, self.scheduler.timesteps[self.step].reshape(1)

    def finish(self, positive: Tensor, negative: Tensor | None) -> None:
        """Take the next step with predictions (1, C, H, W) of the denoiser.

        Args:
            negative: prediction for the negative prompt; None if the forward had no negative half.
        """
        self.computed += 1
        prediction = positive
        if self.negative is not None:
            prediction = torch.cat([self._negative(positive, negative), positive])
        if self._schedule is not None:
            own = prediction * self.model.prediction_sign
            inputs = [t.clone() for t in self._cache_inputs()]
            point = Point(self.step, inputs, [own], (own,))
            self._history.add(0, point)
        self._take(prediction)

    def _negative(self, positive: Tensor, negative: Tensor | None) -> Tensor:
        """Return the negative prediction, or what stands for one that was not computed."""
        if negative is None:
            # without a difference the guided prediction is the positive one
            return positive if self._difference is None else positive - self._difference
        if self.mode.guidance == "reuse":
            self._difference = positive - negative
        return negative

    def _cache_inputs(self) -> list[Tensor]:
        twice = self.negative is not None
        return [torch.cat([self._inputs] * 2) if twice else self._inputs]

    def _take(self, prediction: Tensor) -> None:
        """Take the scheduler's step with a prediction, whose rows are negative and positive."""
        if self.negative is not None:
            scale = self.ticket.settings.guidance_scale
            assert scale is not None
            uncond, cond = prediction.chunk(2)
            prediction = self.model.guided(uncond, cond, scale)
        self.clean = None
        if self.step in self.previews:
            timestep = self.scheduler.timesteps[self.step].reshape(1)
            self.clean = self.model.noise.predict_latents(prediction, self._inputs, timestep)
        self.latents = scheduler_step(
            self.step, prediction, self.latents, self.scheduler, self._generators
        )
        self.step += 1


def preview_steps(steps: int, images: int) -> tuple[int, ...]:
    """Return the steps after which an image is shown, evenly over all but the last.

    Fewer steps than images give fewer images.
    """
    count = min(images, steps - 1)
    return tuple(math.ceil((i + 1) * steps / (count + 1)) - 1 for i in range(count))
