"""Recorders of the states of rollouts, and rollouts of pairs that share their initial noise.

In a rollout of pairs every step takes the flow a little further than its timestep and adds fresh noise (churn). The
image stays on the marginal distribution of the next timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffalign.core.seeds import CHURN, stream
from diffalign.pipelines.recording import Recorder
from diffalign.pipelines.sampling import Generators, Sampling, Step, generators_of
from diffalign.types import Trajectory


def churned(latents: Tensor, noise: Tensor, sigma: float, churn: float) -> Tensor:
    """Return latents (B, ...) with fresh noise, which have a larger noise level than before.

    With r the level of the latents the new level is r (1 + churn) / (1 + churn r).

    Args:
        latents: latents (B, ...) at noise level r.
        noise: standard normal noise (B, ...).
        sigma: noise level r in 0..1.
        churn: share of noise that is added.
    """
    spread = ((1 + churn) ** 2 - 1) ** 0.5
    moved: Tensor = (latents + sigma * spread * noise) / (1 + churn * sigma)
    return moved


def level_before(sigma: float, churn: float) -> float:
    """Return the noise level r that `churned` raises to `sigma`."""
    return sigma / (1 + churn - churn * sigma)


class RolloutStates(Recorder):
    """Recorder of the states that a rollout passes through."""

    def trajectory(self) -> Trajectory:
        """Return the recorded trajectory with every step."""
        rollout = self.take()
        latents = torch.cat([rollout.noisy, rollout.latents.unsqueeze(1)], 1)
        return Trajectory(list(range(rollout.noisy.shape[1])), latents)


class PairedStates(RolloutStates):
    """Recorder of churned rollouts whose images share their initial noise in pairs.

    Args:
        churn: share of noise that each step adds.
    """

    def __init__(self, churn: float) -> None:
        super().__init__(step=self._step, predictions=False)
        self.churn = churn

    def around(self, step: Step | None) -> PairedStates:
        """Return self: the churned step replaces the scheduler's."""
        return self

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        """Return the seed of each image's own noise."""
        return [stream(CHURN, seed) for seed in seeds]

    def start(self, batch: Sampling, generators: Generators, seeds: Sequence[int]) -> Tensor:
        """Return initial latents (B, C, H, W).

        Args:
            batch: the batch to sample.
            generators: generators of the images' own noise.
            seeds: seeds of the initial noise (B,), equal for the images of a pair.
        """
        shared = batch.noise(generators_of(seeds))
        fresh = batch.noise(generators)
        return churned(shared.float(), fresh.float(), 1.0, self.churn).to(shared.dtype)

    def _step(
        self, i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Generators
    ) -> Tensor:
        sigma, following = (float(scheduler.sigmas[j]) for j in (i, i + 1))
        level = level_before(following, self.churn)
        moved = latents.float() + (level - sigma) * model_pred.float()
        if level > 0:
            generators = list(generator) if isinstance(generator, Sequence) else generator
            noise = randn_tensor(
                latents.shape, generator=generators, device=latents.device, dtype=torch.float32
            )
            moved = churned(moved, noise, level, self.churn)
        return moved.to(latents.dtype)


def first_of_pairs(seeds: Sequence[int]) -> list[int]:
    """Return, for each image, the seed of the first image of its pair."""
    return [seeds[i - i % 2] for i in range(len(seeds))]


def partners(rows: Tensor) -> Tensor:
    """Return the row (B,) of the other image of each image's pair."""
    return rows ^ 1


def differences(advantages: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return half the advantages' difference (B,) in each pair, and a mask (B,).

    The mask says whether both images of the pair have a reward.

    Args:
        advantages: advantages (B,), two of each pair in a row. Their means over groups cancel.
        valid: mask (B,) of the images with a reward.
    """
    other = partners(torch.arange(len(advantages)))
    both = valid & valid[other]
    return torch.where(both, (advantages - advantages[other]) / 2, 0.0), both
