"""What a sampler passes through on its way, for those who would otherwise invert its images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.pipelines.sampling import Generators, Step, scheduler_step


@dataclass
class Recorder:
    """A `step` for `sampling.sample` that also remembers. Starts anew with every batch; on the CPU.

    Of the last batch: `noisy` and `model_pred` (B, N, C, H, W), what the denoiser read and predicted at each of N
    steps; `latents` (B, C, H, W) after the last of them.
    """

    step: Step = scheduler_step
    _noisy: list[Tensor] = field(default_factory=list)
    _preds: list[Tensor] = field(default_factory=list)

    def __call__(
        self, i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Generators
    ) -> Tensor:
        if i == 0:
            self._noisy, self._preds = [], []
        shown = latents
        if hasattr(scheduler, "scale_model_input"):  # latents may be held in other units
            shown = scheduler.scale_model_input(latents, scheduler.timesteps[i])
        following = self.step(i, model_pred, latents, scheduler, generator)
        self._noisy.append(shown.cpu())
        self._preds.append(model_pred.cpu())
        self.latents = following.cpu()
        return following

    @property
    def noisy(self) -> Tensor:
        return torch.stack(self._noisy, 1)

    @property
    def model_pred(self) -> Tensor:
        return torch.stack(self._preds, 1)
