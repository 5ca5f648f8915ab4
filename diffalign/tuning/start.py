"""Where a search begins: the factors in closed form, from one pass of the quantised and of the full-precision model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.core.precision import compute
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.sampling import Sampling, scheduler_step, step_options
from diffalign.schedulers import Coefficients
from diffalign.schedulers.closed_form import best_factors
from diffalign.schedulers.coefficients import LEAST, MOST
from diffalign.tuning.evaluator import Evaluator

RIDGE = 1e-3


@torch.no_grad()
def closed_form(
    evaluator: Evaluator, reference: TextToImageModel, *, ridge: float = RIDGE
) -> Coefficients:
    """The factors that keep the evaluator's model nearest to the trajectories of `reference`, step by step.

    Both start from the same noise and meet the same noise on the way; 2 N network rows an image, of which those of
    the evaluator's model are counted.

    Raises:
        UsageError: the reference is another kind of model.
    """
    model = evaluator.model
    if type(reference) is not type(model):
        raise UsageError(
            f"reference: a {reference.family} model cannot stand for a {model.family} model"
        )
    both = _Pair(evaluator, reference)
    found: list[tuple[float, float]] = []
    for i in range(evaluator.drawing.num_inference_steps):
        update = both.batches[0].linear_update(i)
        ours, theirs = both.predictions(i)
        u = update[0] * torch.cat(both.ours)
        v = update[1] * torch.cat(ours)
        y = update[0] * torch.cat(both.theirs) + update[1] * torch.cat(theirs)
        pair = best_factors(u, v, y, ridge=ridge)
        found.append((min(max(pair[0], LEAST), MOST), min(max(pair[1], LEAST), MOST)))
        both.step(i, ours, theirs, found[-1])
    return Coefficients(tuple(a for a, _ in found), tuple(b for _, b in found))


class _Batch:
    """One batch of images as both models draw it."""

    def __init__(
        self, evaluator: Evaluator, reference: TextToImageModel, images: Sequence[int]
    ) -> None:
        self.run, self.generators = evaluator.batch(images)
        self.other = Sampling(
            reference,
            self.run.embeds.to(reference.denoiser.device),
            self.run.num_inference_steps,
            self.run.height,
            self.run.width,
            self.run.guidance_scale,
            self.run.negative_embeds,
        )
        self.other.scheduler = self.run.scheduler  # the same steps, whatever the reference has
        self.start = self.run.start(self.generators)

    def linear_update(self, i: int) -> tuple[float, float]:
        scheduler = self.run.scheduler
        self.run.scaled(i, self.start)
        found = scheduler.linear_update(scheduler.timesteps[i], **step_options(scheduler))
        return found.sample, found.model_output

    def step(
        self, i: int, model_pred: Tensor, latents: Tensor, factors: tuple[float, float]
    ) -> Tensor:
        """In float32, the same factors for every row."""
        scheduler = self.run.scheduler
        rows = len(latents)
        a, b = (torch.full((i + 1, rows), value) for value in factors)
        with scheduler.trial(a, b):
            return scheduler_step(i, model_pred, latents, scheduler, self.generators)


class _Pair:
    """All images of calibration, step by step, in float32."""

    def __init__(self, evaluator: Evaluator, reference: TextToImageModel) -> None:
        self.evaluator = evaluator
        size = evaluator.drawing.micro_batch_size
        count = len(evaluator.prompts)
        self.batches = [
            _Batch(evaluator, reference, range(start, min(start + size, count)))
            for start in range(0, count, size)
        ]
        self.ours = [b.start.float() for b in self.batches]
        self.theirs = [b.start.float() for b in self.batches]

    def predictions(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of both models, each on its own trajectory."""
        ours, theirs = [], []
        device, precision = self.evaluator.model.device, self.evaluator.drawing.mixed_precision
        with compute(device, precision):
            for batch, here, there in zip(self.batches, self.ours, self.theirs, strict=True):
                dtype = batch.start.dtype
                ours.append(batch.run.predict(i, here.to(dtype)).float())
                theirs.append(batch.other.predict(i, there.to(dtype)).float())
                self.evaluator.count_rows(len(here), forwards=1)
        return ours, theirs

    def step(
        self, i: int, ours: list[Tensor], theirs: list[Tensor], factors: tuple[float, float]
    ) -> None:
        for k, batch in enumerate(self.batches):
            states = [g.get_state() for g in batch.generators]
            self.ours[k] = batch.step(i, ours[k], self.ours[k], factors)
            _rewind(batch.run.scheduler)
            for generator, state in zip(batch.generators, states, strict=True):
                generator.set_state(state)
            self.theirs[k] = batch.step(i, theirs[k], self.theirs[k], (1.0, 1.0))


def _rewind(scheduler: object) -> None:
    """One step back, so that a second trajectory takes the same step."""
    index = getattr(scheduler, "_step_index", None)
    if index is not None:
        scheduler._step_index = index - 1  # type: ignore[attr-defined]
