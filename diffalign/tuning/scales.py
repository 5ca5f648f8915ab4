"""Tune the scales of packed weights on the predictions of the model before its quantisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.core.precision import attention
from diffalign.core.seeds import EVALUATION, stream
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.sampling import Sampling
from diffalign.quantization.tuned import TunedLayer, parameters_of, tunable
from diffalign.tuning.calibration import Calibration

STEPS = 60
"""Updates at 2 bits.

At 3 bits and more GPTQ leaves little to tune."""
ROWS = 12
LEARNING_RATE = 4e-3
HELD_OUT = 8
"""Divisor of the prompts: one in so many is kept for the comparison before and after."""


@dataclass(frozen=True)
class Trajectories:
    """Inputs and predictions of a model while it samples prompts, on the CPU.

    Attributes:
        calibration: prompts and sampling settings.
        inputs: latents (N, C, H, W) in the units of the denoiser's input.
        timesteps: timesteps (N,).
        predictions: the model's predictions (N, C, H, W), guidance included.
        prompts: number (N,) of each row's prompt.
    """

    calibration: Calibration
    inputs: Tensor
    timesteps: Tensor
    predictions: Tensor
    prompts: Tensor

    @classmethod
    def record(cls, calibration: Calibration) -> Trajectories:
        """Sample all prompts once with the model as it is."""
        inputs, timesteps, predictions, prompts = [], [], [], []

        def keep(
            numbers: range, i: int, run: Sampling, latents: Tensor, prediction: Tensor
        ) -> None:
            inputs.append(run.scaled(i, latents).cpu())
            timesteps.append(run.scheduler.timesteps[i].expand(len(numbers)).cpu())
            predictions.append(prediction.cpu())
            prompts.append(torch.tensor(numbers))

        calibration.run(after=keep)
        recorded = (inputs, timesteps, predictions, prompts)
        return cls(calibration, *(torch.cat(parts) for parts in recorded))

    def rows_of(self, *, held_out: bool) -> Tensor:
        """Return the numbers of the rows of held-out prompts, or of all others."""
        count = len(self.calibration.prompts)
        if count < HELD_OUT:
            return torch.arange(len(self.prompts))
        return ((self.prompts % HELD_OUT == 0) == held_out).nonzero().flatten()

    def error(self, rows: Tensor) -> Tensor:
        """Return the squared error of the model's predictions over those recorded, for some rows."""
        calibration, sampler = self.calibration, self._sampler
        model: TextToImageModel = calibration.model
        texts = [calibration.prompts[int(n)].text for n in self.prompts[rows]]
        prediction = model.predict(
            self.inputs[rows].to(model.device),
            self.timesteps[rows].to(model.device),
            sampler.embed(texts),
            guidance_scale=calibration.drawing.guidance_scale,
            negative_embeds=sampler.negatives(len(rows)),
        )
        expected = self.predictions[rows].to(prediction).float()
        return (prediction.float() - expected).square().sum() / expected.square().sum()

    @property
    def _sampler(self) -> Sampler:
        if "sampler" not in vars(self):
            vars(self)["sampler"] = Sampler(self.calibration.model, self.calibration.drawing)
        sampler: Sampler = vars(self)["sampler"]
        return sampler

    @torch.no_grad()
    def mean_error(self, rows: Tensor) -> float:
        """Return the mean of `error` over batches of the sampling settings' size."""
        parts = rows.split(self.calibration.drawing.micro_batch_size)
        with attention(self.calibration.model.device):
            total = sum(float(self.error(part)) * len(part) for part in parts)
        return total / len(rows)


@dataclass(frozen=True)
class ScaleTuning:
    """Result of a tuning: errors of held-out predictions before and after it, in dB.

    Attributes:
        accepted: False if the error did not fall; the scales are then those before.
    """

    steps: int
    before: float
    after: float
    accepted: bool


def tune_scales(trajectories: Trajectories, *, steps: int = STEPS) -> ScaleTuning:
    """Tune the scales and biases of a packed model, whose codes stay.

    Adam minimises the squared error of the predictions over random rows of the trajectories, with a cosine schedule.

    Args:
        trajectories: recorded by `Trajectories.record` before the same model was packed.
        steps: number of updates.

    Raises:
        UsageError: the model has no packed layer, or its predictions are not finite.
    """
    model = trajectories.calibration.model
    held_out, rows = (trajectories.rows_of(held_out=h) for h in (True, False))
    before = trajectories.mean_error(held_out)
    if not math.isfinite(before):
        raise UsageError(
            "tune_steps: predictions of the quantised model are not finite. Set tune_steps=0, or use more bits."
        )
    with tunable(model.denoiser) as layers:
        if not layers:
            raise UsageError(
                f"tune_steps={steps}: the model has no packed weights. Quantise it before, or set tune_steps=0."
            )
        _optimise(trajectories, layers, rows, steps)
        after = trajectories.mean_error(held_out)
        if accepted := after < before:
            for layer in layers.values():
                layer.fold()
    return ScaleTuning(steps, decibels(before), decibels(after), accepted)


def _optimise(
    trajectories: Trajectories, layers: dict[str, TunedLayer], rows: Tensor, steps: int
) -> None:
    """Train factors and biases on random rows."""
    drawing = trajectories.calibration.drawing
    groups = parameters_of(layers)
    optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = min(ROWS, drawing.micro_batch_size)
    with torch.enable_grad(), attention(trajectories.calibration.model.device):
        for batch in _batches(rows, steps, drawing.seed):
            for part in batch.split(size):
                (trajectories.error(part) * len(part) / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()


def _batches(rows: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield random rows for each step, which depend on the seed only."""
    generator = torch.Generator().manual_seed(stream(EVALUATION, seed, steps))
    for _ in range(steps):
        yield rows[torch.randperm(len(rows), generator=generator)[:ROWS]]


def decibels(error: float) -> float:
    """Return a relative squared error in dB."""
    return 10 * math.log10(error) if error > 0 else -math.inf
