"""Students that map every state of a teacher's trajectory to its end (latent consistency)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from diffalign import lora
from diffalign.algorithms.distillation import consistency_output, pseudo_huber
from diffalign.config import ConsistencyConfig
from diffalign.methods.distillation.trainer import DistillationTrainer, Trajectories
from diffalign.training.sums import Sums
from diffalign.types import PromptEmbeds


@dataclass
class ConsistencyTrainer(DistillationTrainer):
    """Trainer of students by latent consistency."""

    @property
    def algorithm(self) -> ConsistencyConfig:
        """Settings of the loss."""
        return cast(ConsistencyConfig, self.config.algorithm)

    @property
    def bootstraps(self) -> bool:
        """True if the averaged student predicts the targets of the student."""
        return self.algorithm.skip is not None

    def losses(self, trajectories: Trajectories, sums: Sums, *, update: int) -> Tensor:
        skip, last = self.algorithm.skip, len(self.grid) - 1
        start, _, _ = self.choices(trajectories.image, last, update)
        rows = self.rows_of_states(trajectories)
        embeds = trajectories.embeds[rows]
        later = torch.full_like(start, last)
        if skip is not None:
            later = (start + skip).clamp(max=last)
        target = trajectories.states[later, rows]
        if skip is not None:
            with torch.no_grad(), lora.policy(self.model.denoiser, lora.AVERAGED):
                guess = self._clean(target, self.grid[later], embeds)
            ended = (later == last).to(guess.device)
            target = torch.where(ended[:, None, None, None], target, guess)
        output = self._clean(trajectories.states[start, rows], self.grid[start], embeds)
        loss = pseudo_huber(output, target, c=self.algorithm.huber_c)
        with torch.no_grad():
            error = (output - target).square().flatten(1).mean(1)
            sums.add("loss", loss.detach())
            sums.add("relative_error", error / target.square().flatten(1).mean(1))
        return loss

    def _clean(self, noisy: Tensor, times: Tensor, embeds: PromptEmbeds) -> Tensor:
        times = times.to(noisy.device)
        model_pred = self.predict(noisy, times, embeds)
        return consistency_output(self.model.noise, model_pred, noisy, times)
