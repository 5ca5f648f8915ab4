"""Students that learn the straight lines of a teacher's trajectories (piecewise rectified flow)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from diffalign.algorithms.distillation import chords, reflow_loss
from diffalign.config import ReflowConfig
from diffalign.methods.distillation.trainer import DistillationTrainer, Trajectories
from diffalign.training.sums import Sums


@dataclass
class ReflowTrainer(DistillationTrainer):
    """Trainer of students by piecewise rectified flow."""

    def losses(self, trajectories: Trajectories, sums: Sums, *, update: int) -> Tensor:
        algorithm = cast(ReflowConfig, self.config.algorithm)
        windows = len(self.coarse) - 1
        parts = (len(self.grid) - 1) // windows
        window, share, coin = self.choices(trajectories.image, windows, update)
        share = torch.where(coin < algorithm.window_starts, 0.0, share)
        rows = self.rows_of_states(trajectories)
        path, device = self.model.noise, trajectories.states.device
        points = chords(
            path,
            trajectories.states[window * parts, rows],
            trajectories.states[(window + 1) * parts, rows],
            self.coarse[window].to(device),
            self.coarse[window + 1].to(device),
            share.to(device),
        )
        model_pred = self.predict(points.noisy_latents, points.timesteps, trajectories.embeds[rows])
        loss = reflow_loss(path, model_pred, points)
        power = points.slope.square().flatten(1).mean(1)
        sums.add("loss", loss.detach())
        sums.add("relative_error", loss.detach() / power)
        return loss
