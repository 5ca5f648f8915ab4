"""Policy updates with a loss on the rollout's own stochastic steps.

The sampler of this module makes these steps and records them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffalign import lora
from diffalign.algorithms import flow_grpo
from diffalign.algorithms.advantages import TOLERANCE
from diffalign.algorithms.trajectory import StochasticStep, TrajectoryLoss, TrajectorySample
from diffalign.config.algorithms import TrajectoryConfig
from diffalign.core.errors import UsageError
from diffalign.core.seeds import WINDOW, stream
from diffalign.diffusion.paths import expand
from diffalign.methods.online.update import PolicyUpdate, TrainingBatch, UpdateSettings
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.training.sums import Sums
from diffalign.types import Trajectory


class StochasticSampler:
    """Sampling step that is stochastic in a window of the grid.

    Outside the window it is the scheduler's own step. `pipelines.sampling` calls the object at every step. Call
    `trajectory()` after all micro-batches of a rollout.

    Args:
        window: indices of the stochastic steps.
    """

    def __init__(self, config: TrajectoryConfig, window: range) -> None:
        self.config = config
        self.window = window
        self._kept: list[list[Tensor]] = [[] for _ in range(len(window) + 1)]

    def __call__(
        self, i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Any
    ) -> Tensor:
        ode: Tensor = scheduler.step(
            model_pred, scheduler.timesteps[i], latents, return_dict=False
        )[0]
        if i not in self.window:
            return ode
        sigma, following = (scheduler.sigmas[j].expand(len(latents)) for j in (i, i + 1))
        step = flow_grpo.stochastic_step(
            model_pred,
            latents,
            sigma.to(latents.device),
            following.to(latents.device),
            noise_level=self.config.noise_level,
            dynamics=self.config.dynamics,
        )
        noise: Tensor = randn_tensor(
            latents.shape, generator=generator, device=latents.device, dtype=torch.float32
        )
        after = step.mean + expand(step.std, latents) * noise
        # the log-probability is computed for the stored state, which must therefore be the state that sampling uses
        after = after.to(latents.dtype)
        states = self._kept[i - self.window.start]
        states.append(latents)
        if i == self.window.stop - 1:
            self._kept[-1].append(after)
        return after

    def trajectory(self) -> Trajectory:
        """Return the recorded states of all micro-batches of the rollout, and release them."""
        states, self._kept = self._kept, []
        return Trajectory(list(self.window), torch.stack([torch.cat(part) for part in states], 1))


class TrajectoryUpdate(PolicyUpdate):
    """Update of a `TrajectoryLoss`, which trains on all stochastic steps of a micro-batch at once."""

    def __init__(
        self,
        model: TextToImageModel,
        config: TrajectoryConfig,
        settings: UpdateSettings,
        algorithm: TrajectoryLoss = flow_grpo.LOSS,
    ) -> None:
        super().__init__(model, config, settings)
        self.config, self.algorithm = config, algorithm
        if model.costs_a_forward(settings.guidance_scale):
            raise UsageError(
                f"rollout.guidance_scale={settings.guidance_scale}: {config.type} computes likelihoods of the policy "
                "without guidance. Remove the setting"
            )
        self.sigmas = settings.sigmas.float().cpu()
        self.stop = min(round(config.window_stop * len(settings.grid)), self._stochastic_steps())
        self.size = config.window_size or self.stop
        if not 1 <= self.size <= self.stop:
            raise UsageError(
                f"algorithm.window_size: {self.size} stochastic steps do not fit into {len(settings.grid)} steps, "
                f"of which {self.stop} may be stochastic; use more rollout.num_inference_steps, a smaller window, "
                "or algorithm.dynamics=cps"
            )

    def _stochastic_steps(self) -> int:
        """Return the number of steps, from the start of the grid, that may be stochastic.

        The noise of such a step is at most the noise level after it, so that later steps can remove it.
        """
        before, after = self.sigmas[:-1], self.sigmas[1:]
        nothing = torch.zeros(len(before), 1)
        step = flow_grpo.stochastic_step(
            nothing,
            nothing,
            before,
            after,
            noise_level=self.config.noise_level,
            dynamics=self.config.dynamics,
        )
        wrong = (step.std <= 0) | (step.std > after)
        return int(wrong.nonzero()[0]) if wrong.any() else len(before)

    @property
    def metrics(self) -> list[str]:
        return [*self.algorithm.metrics, *(["kl"] if self.config.kl_beta else [])]

    def sizes(self, images: int) -> CompiledSizes:
        policy = images * self.size
        reference = self.model.forward_rows(policy, self.reference_guidance_scale)
        return CompiledSizes({policy}, {reference} if self.config.kl_beta else set())

    def takes_part(self, advantages: Tensor, group: Tensor) -> Tensor:
        """Return a mask (B,) of the images that take part in the loss.

        As in Flow-GRPO's released code, the image's own advantage must differ from 0, too.
        """
        return super().takes_part(advantages, group) & (advantages.abs() > TOLERANCE)

    def sampler(self, update: int) -> StochasticSampler:
        """Return the stochastic sampler of an update, with the window of that update."""
        start = stream(WINDOW, self.settings.seed, update) % (self.stop - self.size + 1)
        return StochasticSampler(self.config, range(start, start + self.size))

    def begin_rollout(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch with room for the old policy's log-probabilities, and means if needed."""
        if batch.trajectory is None:
            raise ValueError("a loss on trajectories needs the trajectory of the rollout")
        latents = batch.trajectory.latents
        means = None
        if self.config.needs_mean:
            means = torch.empty_like(latents[:, 1:], dtype=torch.float32)
        old_log_probs = torch.empty(len(latents), self.size, device=latents.device)
        return replace(batch, old_log_probs=old_log_probs, old_means=means)

    def _store(
        self, batch: TrainingBatch, rows: range, log_probs: Tensor, step: StochasticStep
    ) -> None:
        """Store what the policy, which is the old one before the first optimizer step, gives."""
        assert batch.old_log_probs is not None
        part = slice(rows.start, rows.stop)
        batch.old_log_probs[part] = log_probs.detach().view(len(rows), -1)
        if batch.old_means is not None:
            batch.old_means[part] = step.mean.detach().view_as(batch.old_means[part])

    def micro_batch(
        self,
        batch: TrainingBatch,
        rows: range,
        sums: Sums,
        *,
        update: int,
        inner: int,
    ) -> Tensor:
        assert batch.trajectory is not None
        config, part = self.config, batch.trajectory[rows.start : rows.stop]
        device, steps = part.latents.device, len(part.steps)
        repeat = batch.prompt_index[rows.start : rows.stop].repeat_interleave(steps)
        embeds = batch.embeds[repeat.to(device)]
        index = torch.tensor(part.steps).repeat(len(rows))
        latents, times = part.latents[:, :-1].flatten(0, 1), self.grid[index].to(device)
        advantages = batch.advantages[rows.start : rows.stop].repeat_interleave(steps).to(device)

        def step(policy: str) -> StochasticStep:
            guidance = self.reference_guidance_scale if policy == lora.REFERENCE else None
            with lora.policy(self.model.denoiser, policy):
                pred = self.predict(latents, times, embeds, guidance)
            return flow_grpo.stochastic_step(
                pred,
                latents,
                self.sigmas[index].to(device),
                self.sigmas[index + 1].to(device),
                noise_level=config.noise_level,
                dynamics=config.dynamics,
            )

        current = step(lora.CURRENT)
        log_probs = flow_grpo.log_prob(
            part.latents[:, 1:].flatten(0, 1), current, dynamics=config.dynamics
        )
        if inner == 0:
            self._store(batch, rows, log_probs, current)
        assert batch.old_log_probs is not None
        old = slice(rows.start, rows.stop)
        old_mean = None if batch.old_means is None else batch.old_means[old].flatten(0, 1)
        sample = TrajectorySample(
            current, log_probs, batch.old_log_probs[old].flatten(), advantages, old_mean
        )
        loss, metrics = self.algorithm.loss(sample, config)
        for name, values in metrics.items():
            sums.add(name, values)
        # Flow-GRPO's released code averages both terms over the images that it trains on.
        total = loss.sum() / (batch.trained * steps)
        if config.kl_beta:
            with torch.no_grad():
                reference = step(lora.REFERENCE)
            distance = flow_grpo.reference_distance(current, reference)
            sums.add("kl", distance.detach())
            weight = config.kl_beta * self.kl_factor
            total = total + weight * distance.sum() / (batch.trained * steps)
        return total
