"""Updates with a loss on the forward process: latents of the rollout are noised afresh, at timesteps of its grid, or
have the noise that they were made from.

Noise and timesteps of an image, or of all images of a prompt, come from a stream of its own, so that they depend
neither on the micro-batch nor on the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign import lora
from diffalign.algorithms import awm, diffusion_nft, timesteps
from diffalign.algorithms.forward_process import ForwardSample, lag_decay, proximal_loss
from diffalign.config import ForwardProcessConfig
from diffalign.core.errors import UsageError
from diffalign.core.seeds import TIMESTEPS, stream
from diffalign.diffusion.paths import chord_target, has_noise_after_step
from diffalign.methods.online.update import PolicyUpdate, TrainingBatch, UpdateSettings
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.recording import Recorder
from diffalign.training.sums import Sums
from diffalign.types import Trajectory

LOSSES = {"awm": awm, "diffusion_nft": diffusion_nft}


@dataclass(frozen=True)
class Draws:
    """Random choices for N images: `grid_index` (N, T), `noise` (N, T, C, H, W), `kl_pick` (N, K) of the T."""

    grid_index: Tensor
    noise: Tensor
    kl_pick: Tensor


def draw(
    batch: TrainingBatch,
    rows: range,
    parts: list[range],
    *,
    kl_timesteps: int,
    key: tuple[int, ...],
    by_group: bool = False,
) -> Draws:
    """Timesteps, noise and the subset for the distances: for each image, or the first two the same for all images of
    a prompt.

    Advantages of a group add up to nothing, and so does, with one noise, what its images have in common: the same
    expectation, a lower variance. The distances have no advantages: each image has a subset of its own.
    """
    index, noise, pick = [], [], []
    for row in rows:
        image = batch.image[row]
        own = int(batch.prompt_index[row]) if by_group else image
        generator = torch.Generator().manual_seed(stream(TIMESTEPS, *key, own))
        index.append(timesteps.draw(parts, generator=generator))
        noise.append(torch.randn(len(parts), *batch.latents.shape[1:], generator=generator))
        if by_group:
            generator = torch.Generator().manual_seed(stream(TIMESTEPS, *key, image, len(parts)))
        pick.append(torch.randperm(len(parts), generator=generator)[:kl_timesteps])
    return Draws(torch.stack(index), torch.stack(noise), torch.stack(pick))


class RolloutStates(Recorder):
    """The states that a rollout passes through."""

    def trajectory(self) -> Trajectory:
        """Of all steps."""
        drawn = self.take()
        latents = torch.cat([drawn.noisy, drawn.latents.unsqueeze(1)], 1)
        return Trajectory(list(range(drawn.noisy.shape[1])), latents)


class ForwardProcessUpdate(PolicyUpdate):
    """AWM, DiffusionNFT: the loss of the module that the algorithm's type names, and two distances."""

    def __init__(
        self, model: TextToImageModel, config: ForwardProcessConfig, settings: UpdateSettings
    ) -> None:
        super().__init__(model, config, settings)
        self.config = config
        self.algorithm: Any = LOSSES[config.type]
        self.off_policy = self.algorithm.NEEDS_OLD or settings.updates_per_rollout > 1
        self.rollout_policy = lora.LAGGED if self.off_policy else lora.CURRENT
        self.parts = timesteps.strata(
            len(settings.grid),
            config.timesteps_per_image,
            start=config.timestep_start,
            stop=config.timestep_stop,
            independent=config.timestep_sampling == "independent",
        )
        if config.noise == "rollout":
            self._check_noise()
        self.distances = (
            ("kl", config.kl_beta, lora.REFERENCE),
            ("kl_lagged", config.ema_kl_beta, lora.LAGGED),
        )

    def _check_noise(self) -> None:
        """UsageError where states are trained on from which there is no way to go but the model's."""
        enough = int(has_noise_after_step(self.settings.sigmas[:-1]).sum())
        if self.parts[-1].stop > enough:
            raise UsageError(
                f"algorithm.noise=rollout: after the last {len(self.grid) - enough} of {len(self.grid)} steps no noise "
                "is left, and they lead where the model itself says: needs algorithm.timestep_stop="
                f"{math.floor(100 * enough / len(self.grid)) / 100:g} or less"
            )

    def sampler(self, update: int) -> Any:
        """For `noise: rollout`, the solver's step that remembers where it was."""
        return RolloutStates(predictions=False) if self.config.noise == "rollout" else None

    def takes_part(self, advantages: Tensor, group: Tensor) -> Tensor:
        """Return which images take part: of DiffusionNFT all, whose proximal part does not end with the advantage."""
        if self.algorithm.NEEDS_OLD:
            return advantages.isfinite()
        return super().takes_part(advantages, group)

    def lag_decay(self, update: int) -> float:
        return lag_decay(update, ramp=self.config.lag_ramp, maximum=self.config.lag_max)

    @property
    def metrics(self) -> list[str]:
        return [
            *self.algorithm.METRICS,
            *(name for name, weight, _ in self.distances if weight),
        ]

    def rows(self, images: int) -> dict[bool, set[int]]:
        policy = images * self.config.timesteps_per_image
        picked = images * self.config.kl_timesteps
        without = {policy} if self.off_policy else set()
        for _, weight, other in self.distances:
            if weight and other == lora.REFERENCE:
                without.add(self.model.forward_rows(picked, self.reference_guidance_scale))
            elif weight and not self.off_policy:
                without.add(picked)
        return {True: {policy}, False: without}

    def micro_batch(
        self,
        batch: TrainingBatch,
        rows: range,
        sums: Sums,
        *,
        key: tuple[int, int],
    ) -> Tensor:
        model, config = self.model, self.config
        steps = config.timesteps_per_image
        device = batch.latents.device
        draws = draw(
            batch,
            rows,
            self.parts,
            kl_timesteps=config.kl_timesteps,
            key=(self.settings.seed, *key),
            by_group=config.noise == "group",
        )
        latents = batch.latents[rows.start : rows.stop].float().repeat_interleave(steps, 0)
        times = self.grid[draws.grid_index].flatten().to(device)
        embeds = batch.embeds[
            batch.prompt_index[rows.start : rows.stop].repeat_interleave(steps).to(device)
        ]
        advantages = batch.advantages[rows.start : rows.stop].repeat_interleave(steps).to(device)
        if batch.trajectory is None:
            noise = draws.noise.flatten(0, 1).to(device)
            noisy = model.noise.add_noise(latents, noise, times)
            target = model.noise.target(latents, noise, times)
        else:
            states = batch.trajectory[rows.start : rows.stop].latents
            of_image = torch.arange(len(rows)).unsqueeze(1)
            noisy = states[of_image, draws.grid_index].flatten(0, 1).float().to(device)
            target = chord_target(model.noise, latents, noisy, times)
        sigmas = model.noise.scales(times)[1]

        old = None
        if self.off_policy:
            with torch.no_grad(), lora.policy(model.denoiser, lora.LAGGED):
                old = self.predict(noisy, times, embeds)
        pred = self.predict(noisy, times, embeds)
        sample = ForwardSample(latents, noisy, target, sigmas, advantages, pred, old)
        loss, metrics = self.algorithm.loss(sample, config)
        for name, values in metrics.items():
            sums.add(name, values)
        total = loss.sum() / (batch.total * steps)
        offset = torch.arange(len(rows)).unsqueeze(1) * steps
        picked = (draws.kl_pick + offset).flatten().to(device)
        for name, weight, policy in self.distances:
            if weight == 0:
                continue
            if policy == lora.LAGGED and old is not None:
                other = old[picked]
            else:
                guidance = self.reference_guidance_scale if policy == lora.REFERENCE else None
                with torch.no_grad(), lora.policy(model.denoiser, policy):
                    other = self.predict(noisy[picked], times[picked], embeds[picked], guidance)
            distance = proximal_loss(pred[picked], other)
            sums.add(name, distance.detach())
            # a mean over the picked timesteps has the expectation of the mean over all of them
            total = total + weight * distance.sum() / (batch.kept * config.kl_timesteps)
        return total
