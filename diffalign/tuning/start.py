"""Closed-form factors as the start of a search.

They come from one pass of the quantised and the full-precision model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
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
    """Return the factors that keep the evaluator's model nearest to trajectories of `reference`.

    Factors are fitted step by step. Both models have the same initial noise and the same noise in each step. The cost
    is 2 N denoiser rows per image; those of the evaluator's model are counted.

    Raises:
        UsageError: the reference is a model of another family.
    """
    model = evaluator.model
    if type(reference) is not type(model):
        raise UsageError(
            f"reference: a {reference.family} model cannot stand for a {model.family} model. Give the model before "
            "it was quantised."
        )
    both = _Pair(evaluator, reference)
    factors: list[tuple[float, float]] = []
    for i in range(evaluator.drawing.num_inference_steps):
        update = both.batches[0].linear_update(i)
        model_preds, reference_preds = both.predictions(i)
        u = update[0] * torch.cat(both.latents)
        v = update[1] * torch.cat(model_preds)
        y = update[0] * torch.cat(both.reference_latents) + update[1] * torch.cat(reference_preds)
        pair = best_factors(u, v, y, ridge=ridge)
        factors.append((min(max(pair[0], LEAST), MOST), min(max(pair[1], LEAST), MOST)))
        both.step(i, model_preds, reference_preds, factors[-1])
    return Coefficients(tuple(a for a, _ in factors), tuple(b for _, b in factors))


class _Batch:
    """One batch of images, sampled by both models."""

    def __init__(
        self, evaluator: Evaluator, reference: TextToImageModel, images: Sequence[int]
    ) -> None:
        self.run, self.generators = evaluator.batch(images)
        self.other = Sampling(
            reference,
            self.run.embeds.to(reference.denoiser.device),
            # the reference's own size may differ
            replace(self.run.drawing, size=self.run.size),
            self.run.negative_embeds,
        )
        # Both models take the same steps, whichever scheduler the reference has.
        self.other.scheduler = self.run.scheduler
        self.start = self.run.start(self.generators)

    def linear_update(self, i: int) -> tuple[float, float]:
        scheduler = self.run.scheduler
        self.run.scaled(i, self.start)
        update = scheduler.linear_update(scheduler.timesteps[i], **step_options(scheduler))
        return update.sample, update.model_output

    def step(
        self, i: int, model_pred: Tensor, latents: Tensor, factors: tuple[float, float]
    ) -> Tensor:
        """Take one step in float32 with the same factors for every row."""
        scheduler = self.run.scheduler
        rows = len(latents)
        a, b = (torch.full((i + 1, rows), value) for value in factors)
        with scheduler.trial(a, b):
            return scheduler_step(i, model_pred, latents, scheduler, self.generators)


class _Pair:
    """All calibration images on both models' trajectories, step by step, in float32."""

    def __init__(self, evaluator: Evaluator, reference: TextToImageModel) -> None:
        self.evaluator = evaluator
        images = range(len(evaluator.prompts))
        self.batches = [
            _Batch(evaluator, reference, images[part])
            for part in evaluator.drawing.batches(len(images))
        ]
        self.latents = [b.start.float() for b in self.batches]
        self.reference_latents = [b.start.float() for b in self.batches]

    def predictions(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the predictions of both models, each on its own trajectory."""
        model_preds, reference_preds = [], []
        trajectories = zip(self.batches, self.latents, self.reference_latents, strict=True)
        with self.evaluator.sampler.computing():
            for batch, x, reference_x in trajectories:
                dtype = batch.start.dtype
                model_preds.append(batch.run.predict(i, x.to(dtype)).float())
                reference_preds.append(batch.other.predict(i, reference_x.to(dtype)).float())
                self.evaluator.count_rows(len(x), forwards=1)
        return model_preds, reference_preds

    def step(
        self,
        i: int,
        model_preds: list[Tensor],
        reference_preds: list[Tensor],
        factors: tuple[float, float],
    ) -> None:
        for k, batch in enumerate(self.batches):
            states = [g.get_state() for g in batch.generators]
            self.latents[k] = batch.step(i, model_preds[k], self.latents[k], factors)
            _rewind(batch.run.scheduler)
            for generator, state in zip(batch.generators, states, strict=True):
                generator.set_state(state)
            self.reference_latents[k] = batch.step(
                i, reference_preds[k], self.reference_latents[k], (1.0, 1.0)
            )


def _rewind(scheduler: object) -> None:
    """Go back one step, so that a second trajectory takes the same step."""
    index = getattr(scheduler, "_step_index", None)
    if index is not None:
        scheduler._step_index = index - 1  # type: ignore[attr-defined]
