"""What a sampler passes through on its way: inverted states of its own images, without an inversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.pipelines.sampling import Generators, Step, scheduler_step


@dataclass(frozen=True)
class Recording:
    """Of B images in N steps, on the CPU, as the sampler held them: `noisy`, what the denoiser read, and `model_pred`,
    what it predicted (B, N, C, H, W), or None; `latents` (B, C, H, W) after the last step."""

    noisy: Tensor
    model_pred: Tensor | None
    latents: Tensor


@dataclass
class Recorder:
    """A `step` for `sampling.sample` that also remembers, batch after batch, until it is asked; `predictions`, too, or
    states alone."""

    step: Step = scheduler_step
    predictions: bool = True
    _batches: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = field(default_factory=list)

    def __call__(
        self, i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Generators
    ) -> Tensor:
        if i == 0:
            self._batches.append(([], [], []))
        noisy, preds, ends = self._batches[-1]
        shown = latents
        if hasattr(scheduler, "scale_model_input"):  # latents may be held in other units
            shown = scheduler.scale_model_input(latents, scheduler.timesteps[i])
        following = self.step(i, model_pred, latents, scheduler, generator)
        noisy.append(shown.cpu())
        if self.predictions:
            preds.append(model_pred.cpu())
        ends[:] = [following.cpu()]
        return following

    def around(self, step: Step | None) -> Recorder:
        """The same, of another step than the scheduler's own."""
        self.step = step or scheduler_step
        return self

    def take(self) -> Recording:
        """All batches since it was asked last."""
        batches, self._batches = self._batches, []
        noisy, preds, ends = zip(*batches, strict=True)
        return Recording(
            torch.cat([torch.stack(part, 1) for part in noisy]),
            torch.cat([torch.stack(part, 1) for part in preds]) if self.predictions else None,
            torch.cat([end for (end,) in ends]),
        )
