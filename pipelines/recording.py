"""Recording of the sampler's states, which replace inverted states of generated images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.pipelines.sampling import Generators, Step, scaled, scheduler_step


@dataclass(frozen=True)
class Recording:
    """Recorded states of B images in N steps, on the CPU, in the sampler's dtype.

    Attributes:
        noisy: (B, N, C, H, W), inputs of the denoiser.
        model_pred: (B, N, C, H, W), predictions of the denoiser, or None.
        latents: (B, C, H, W), after the last step.
    """

    noisy: Tensor
    model_pred: Tensor | None
    latents: Tensor


@dataclass
class Recorder:
    """Step for `sampling.sample` that also records states until `take` is called.

    With `predictions` it records the model's predictions, too.
    """

    step: Step = scheduler_step
    predictions: bool = True
    _batches: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = field(default_factory=list)

    def __call__(
        self, i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Generators
    ) -> Tensor:
        if i == 0:
            self._batches.append(([], [], []))
        noisy, preds, ends = self._batches[-1]
        shown = scaled(scheduler, i, latents)
        following = self.step(i, model_pred, latents, scheduler, generator)
        noisy.append(shown.cpu())
        if self.predictions:
            preds.append(model_pred.cpu())
        ends[:] = [following.cpu()]
        return following

    def around(self, step: Step | None) -> Recorder:
        """Record `step` instead of the scheduler's step, and return self."""
        self.step = step or scheduler_step
        return self

    def take(self) -> Recording:
        """Return the batches recorded since the last call, concatenated."""
        batches, self._batches = self._batches, []
        noisy, preds, ends = zip(*batches, strict=True)
        return Recording(
            torch.cat([torch.stack(part, 1) for part in noisy]),
            torch.cat([torch.stack(part, 1) for part in preds]) if self.predictions else None,
            torch.cat([end for (end,) in ends]),
        )
