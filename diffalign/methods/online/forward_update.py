"""Policy updates with a loss on the forward process.

The rollout's clean latents get fresh noise at timesteps of the rollout's grid. With `noise: rollout` the loss uses the
states that the rollout passed through instead.

Noise and timesteps of an image, or of all images of a prompt, come from a random stream of their own. They depend
neither on the micro-batch size nor on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign import lora
from diffalign.algorithms import timesteps
from diffalign.algorithms.advantages import TOLERANCE, optimality
from diffalign.algorithms.forward_process import (
    ForwardLoss,
    ForwardSample,
    lag_decay,
    norm_hinge,
    norm_ratio,
    proximal_loss,
)
from diffalign.config import ForwardProcessConfig
from diffalign.core.errors import UsageError
from diffalign.core.seeds import TIMESTEPS, stream
from diffalign.diffusion.paths import chord_target, has_noise_after_step
from diffalign.methods.online.states import PairedStates, RolloutStates
from diffalign.methods.online.update import PolicyUpdate, TrainingBatch, UpdateSettings
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.training.sums import Sums, micro_batches
from diffalign.types import DenoisingBatch

LEAST_KL = 1e-4
"""Weight that the distance to the reference keeps for the worst images with `kl_by_reward`."""


@dataclass(frozen=True)
class Draws:
    """Random choices for N images with T timesteps each.

    Attributes:
        grid_index: indices of the timesteps on the grid (N, T).
        noise: noise (N, T, C, H, W).
        kl_pick: indices, among the T timesteps, of those at which the distances are computed (N, K).
    """

    grid_index: Tensor
    noise: Tensor
    kl_pick: Tensor


@dataclass(frozen=True)
class TrainingStates:
    """States of N images with T timesteps each, in N * T rows.

    Attributes:
        batch: denoising batch (N * T rows).
        latents: clean latents (N * T, C, H, W).
        advantages: advantages (N * T,).
        picked: rows (N * K,) at which the distances are computed.
        partner: clean latents (N * T, C, H, W) of the other image of each pair, for losses on pairs.
    """

    batch: DenoisingBatch
    latents: Tensor
    advantages: Tensor
    picked: Tensor
    partner: Tensor | None = None


def draw(
    batch: TrainingBatch,
    rows: range,
    parts: list[range],
    *,
    kl_timesteps: int,
    key: tuple[int, ...],
    by_group: bool = False,
) -> Draws:
    """Draw timesteps, noise and the timesteps of the distances for some rows of a batch.

    With `by_group`, all images of a prompt share their timesteps and noise. The advantages of a group sum to zero.
    With shared noise, the part of the gradient that its images have in common therefore cancels, too: the expectation
    is the same and the variance is lower. The distances are not weighted by advantages, so each image has its own
    `kl_pick`.

    Args:
        rows: rows of the batch.
        parts: ranges of the grid; one timestep is drawn from each.
        kl_timesteps: number of timesteps at which the distances are computed (K).
        key: what the random stream depends on besides the image: seed, update and optimizer step.
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


class ForwardProcessUpdate(PolicyUpdate):
    """Update of a `ForwardLoss`, plus two distances.

    The distances are those of the policy's predictions to the reference's ("kl") and to the lagged policy's
    ("kl_lagged").
    """

    def __init__(
        self,
        model: TextToImageModel,
        config: ForwardProcessConfig,
        settings: UpdateSettings,
        algorithm: ForwardLoss,
    ) -> None:
        super().__init__(model, config, settings)
        self.config, self.algorithm = config, algorithm
        self.paired = algorithm.paired
        self.off_policy = algorithm.needs_old or settings.updates_per_rollout > 1
        self.rollout_policy = lora.LAGGED if self.off_policy else lora.CURRENT
        if algorithm.own_sampler:
            self.rollout_policy = lora.SAMPLER
        self.parts = timesteps.strata(
            len(settings.grid),
            config.timesteps_per_image,
            start=config.timestep_start,
            stop=config.timestep_stop,
            independent=config.timestep_sampling == "independent",
        )
        # losses on pairs have targets of their own
        if config.noise == "rollout" and not self.paired:
            self._check_noise()
        self.distances = (
            ("kl", config.kl_beta, lora.REFERENCE),
            ("kl_lagged", config.ema_kl_beta, lora.LAGGED),
        )
        self.group_means: Tensor | None = None
        """Means (P, T) of the loss's `GroupStatistic` for the prompts of the update."""

    def _check_noise(self) -> None:
        """Raise UsageError if timesteps are trained on after which no noise is left.

        Such a step leads to the model's own prediction, so that its state has no independent target.
        """
        enough = int(has_noise_after_step(self.settings.sigmas[:-1]).sum())
        if self.parts[-1].stop > enough:
            raise UsageError(
                f"algorithm.noise=rollout: after the last {len(self.grid) - enough} of {len(self.grid)} steps no noise "
                "is left, so that their states have no target but the model's own prediction. Set "
                f"algorithm.timestep_stop={math.floor(100 * enough / len(self.grid)) / 100:g} or less"
            )

    def sampler(self, update: int) -> Any:
        """Return a recorder of the solver's steps for `noise: rollout`, else None."""
        if self.paired:
            # only the settings of such algorithms have a churn
            settings: Any = self.config
            return PairedStates(settings.churn)
        return RolloutStates(predictions=False) if self.config.noise == "rollout" else None

    def takes_part(self, advantages: Tensor, group: Tensor) -> Tensor:
        """Return a mask (B,) of the images that take part in the loss.

        All images with a reward take part in a loss with an old policy (DiffusionNFT): its proximal term does not
        vanish with the advantage. Of a loss on pairs, those whose rewards differ do.
        """
        if self.algorithm.needs_old:
            return advantages.isfinite()
        if self.paired:
            return advantages.abs() > TOLERANCE
        return super().takes_part(advantages, group)

    def decays(self, update: int) -> dict[str, float]:
        c = self.config
        decays = {
            lora.LAGGED: lag_decay(update, ramp=c.lag_ramp, maximum=c.lag_max, start=c.lag_start)
        }
        if self.algorithm.own_sampler:
            # only the settings of such algorithms have a decay for the sampler
            settings: Any = c
            decays[lora.SAMPLER] = settings.sampler_decay(update)
        return decays

    @property
    def metrics(self) -> list[str]:
        return [
            *self.algorithm.metrics,
            *(name for name, weight, _ in self.distances if weight),
            *(["norm_ratio"] if self._has_norms else []),
        ]

    @property
    def _has_norms(self) -> bool:
        """True if the norms of predictions are compared with the reference's without guidance."""
        unguided = self.config.kl_beta > 0 and self.reference_guidance_scale is None
        return unguided or self.config.norm_guard > 0

    def sizes(self, images: int) -> CompiledSizes:
        policy = images * self.config.timesteps_per_image
        picked = images * self.config.kl_timesteps
        plain = self.off_policy or self.algorithm.group or self.algorithm.needs_reference
        without = {policy} if plain else set()
        for _, weight, other in self.distances:
            if weight and other == lora.REFERENCE:
                without.add(self.model.forward_rows(picked, self.reference_guidance_scale))
            elif weight and not self.off_policy:
                without.add(picked)
        if self.config.norm_guard:
            without.add(picked)
        return CompiledSizes({policy}, without)

    def begin_step(self, batch: TrainingBatch, *, update: int, inner: int) -> None:
        """Compute the means over the images of a prompt that the loss needs, without gradients."""
        statistic = self.algorithm.group
        if statistic is None:
            return
        steps = self.config.timesteps_per_image
        # sums and counts of every prompt and timestep, in float64 so that their order does not matter
        table = torch.zeros(2, len(batch.embeds), steps, dtype=torch.float64)
        for rows in micro_batches(len(batch.image), self.settings.micro_batch_size):
            states = self._states(batch, rows, update=update, inner=inner)
            with torch.no_grad():
                sample = self._sample(
                    states,
                    needs_old=statistic.needs_old,
                    needs_reference=statistic.needs_reference,
                )
                values = statistic.values(sample, self.config).double().cpu().view(-1, steps)
            index = batch.prompt_index[rows.start : rows.stop]
            table[0].index_add_(0, index, values)
            table[1].index_add_(0, index, torch.ones_like(values))
        table = self.settings.sum_processes(table.to(batch.latents.device)).cpu()
        self.group_means = table[0] / table[1].clamp(min=1)

    def micro_batch(
        self,
        batch: TrainingBatch,
        rows: range,
        sums: Sums,
        *,
        update: int,
        inner: int,
    ) -> Tensor:
        states = self._states(batch, rows, update=update, inner=inner)
        sample = self._sample(
            states, needs_old=self.off_policy, needs_reference=self.algorithm.needs_reference
        )
        if self.group_means is not None:
            means = self.group_means[batch.prompt_index[rows.start : rows.stop]].flatten()
            sample = replace(sample, group_mean=means.float().to(batch.latents.device))
        loss, metrics = self.algorithm.loss(sample, self.config)
        for name, values in metrics.items():
            sums.add(name, values)
        total = loss.sum() / (batch.total * self.config.timesteps_per_image)
        # a mean over the picked timesteps has the expectation of the mean over all of them
        count = batch.trained * self.config.kl_timesteps
        for penalty in self._penalties(states, sample, sums):
            total = total + penalty / count
        return total

    def _penalties(
        self, states: TrainingStates, sample: ForwardSample, sums: Sums
    ) -> Iterator[Tensor]:
        """Yield the weighted sums of the distances, and of NormGuard's hinge, at the picked timesteps."""
        config, pred = self.config, sample.model_pred[states.picked]
        reference = None
        for name, constant, policy in self.distances:
            if constant == 0:
                continue
            weight = constant * (self.kl_factor if policy == lora.REFERENCE else 1.0)
            other = self._other_pred(states, sample, policy)
            if policy == lora.REFERENCE and self.reference_guidance_scale is None:
                reference = other
            distance = proximal_loss(pred, other)
            sums.add(name, distance.detach())
            if policy == lora.REFERENCE and config.kl_by_reward:
                advantages = sample.advantages[states.picked]
                share = optimality(advantages, clip=config.advantage_clip)
                least = min(1.0, LEAST_KL / weight)
                distance = distance * (least + share * (1 - least))
            yield weight * distance.sum()
        if self._has_norms:
            if reference is None:
                reference = self._other_pred(states, sample, lora.REFERENCE, guided=False)
            ratio = norm_ratio(pred, reference)
            sums.add("norm_ratio", ratio.detach())
            yield config.norm_guard * norm_hinge(ratio).sum()

    def _states(
        self, batch: TrainingBatch, rows: range, *, update: int, inner: int
    ) -> TrainingStates:
        """Return the states of some rows of the batch, T for each image."""
        model, config = self.model, self.config
        steps = config.timesteps_per_image
        device = batch.latents.device
        draws = draw(
            batch,
            rows,
            self.parts,
            kl_timesteps=config.kl_timesteps,
            key=(self.settings.seed, update, inner),
            by_group=config.noise == "group",
        )
        own = slice(rows.start, rows.stop)
        latents = batch.latents[own].float().repeat_interleave(steps, 0)
        times = self.grid[draws.grid_index].flatten().to(device)
        if batch.trajectory is None:
            noise = draws.noise.flatten(0, 1).to(device)
            noisy = model.noise.add_noise(latents, noise, times)
            target = model.noise.target(latents, noise, times)
        else:
            recorded = batch.trajectory[own].latents
            of_image = torch.arange(len(rows)).unsqueeze(1)
            noisy = recorded[of_image, draws.grid_index].flatten(0, 1).float().to(device)
            target = chord_target(model.noise, latents, noisy, times)
        embeds = batch.embeds[batch.prompt_index[own].repeat_interleave(steps).to(device)]
        offset = torch.arange(len(rows)).unsqueeze(1) * steps
        return TrainingStates(
            DenoisingBatch(noisy, times, target, embeds),
            latents,
            batch.advantages[own].repeat_interleave(steps).to(device),
            (draws.kl_pick + offset).flatten().to(device),
            None
            if batch.partner is None
            else batch.partner[own].float().repeat_interleave(steps, 0).to(device),
        )

    def _sample(
        self, states: TrainingStates, *, needs_old: bool, needs_reference: bool
    ) -> ForwardSample:
        """Return the input of the loss: the states with the predictions that it needs."""
        batch = states.batch
        arguments = (batch.noisy, batch.timesteps, batch.embeds)
        old = reference = None
        with torch.no_grad():
            if needs_old:
                with lora.policy(self.model.denoiser, lora.LAGGED):
                    old = self.predict(*arguments)
            if needs_reference:
                with lora.policy(self.model.denoiser, lora.REFERENCE):
                    reference = self.predict(*arguments)
        return ForwardSample(
            states.latents,
            batch.noisy,
            batch.target,
            self.model.noise.scales(batch.timesteps)[1],
            states.advantages,
            self.predict(*arguments),
            old,
            reference,
            partner=states.partner,
        )

    def _other_pred(
        self, states: TrainingStates, sample: ForwardSample, policy: str, *, guided: bool = True
    ) -> Tensor:
        """Return another policy's predictions at the timesteps of the distances.

        Args:
            guided: whether the reference has the guidance of `reference_guidance_scale`.
        """
        picked = states.picked
        guided = guided and policy == lora.REFERENCE
        guidance = self.reference_guidance_scale if guided else None
        if policy == lora.LAGGED and sample.old_pred is not None:
            return sample.old_pred[picked]
        if policy == lora.REFERENCE and sample.reference_pred is not None and guidance is None:
            return sample.reference_pred[picked]
        batch = states.batch[picked]
        with torch.no_grad(), lora.policy(self.model.denoiser, policy):
            return self.predict(batch.noisy, batch.timesteps, batch.embeds, guidance)
