"""Updates with a loss on the rollout's own steps (Flow-GRPO), and the sampler that makes and keeps them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffalign import lora
from diffalign.algorithms import flow_grpo
from diffalign.algorithms.advantages import clip_advantages
from diffalign.config import FlowGRPOConfig
from diffalign.errors import UsageError
from diffalign.pipelines.base import TextToImageModel
from diffalign.seeds import WINDOW, stream
from diffalign.training.update import PolicyUpdate, Sums, TrainingBatch, UpdateSettings
from diffalign.types import Trajectory


class StochasticSampler:
    """A step for `pipelines.sampling`: stochastic in a window of the grid, the scheduler's own elsewhere.

    Call `trajectory()` after all micro-batches of a rollout.
    """

    def __init__(self, config: FlowGRPOConfig, window: range) -> None:
        self.config = config
        self.window = window
        self._kept: list[list[tuple[Tensor, ...]]] = [[] for _ in window]

    def __call__(
        self, i: int, model_pred: Tensor, latents: Tensor, scheduler: Any, generator: Any
    ) -> Tensor:
        ode = scheduler.step(model_pred, scheduler.timesteps[i], latents, return_dict=False)[0]
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
        noise = randn_tensor(
            latents.shape, generator=generator, device=latents.device, dtype=torch.float32
        )
        after = step.mean + step.std.view(-1, *[1] * (latents.ndim - 1)) * noise
        after = after.to(
            latents.dtype
        )  # before the log-probability: what is stored is what is scored
        log_probs = flow_grpo.log_prob(after, step, dynamics=self.config.dynamics)
        self._kept[i - self.window.start].append((latents, after, step.mean, log_probs))
        return after

    def trajectory(self) -> Trajectory:
        """All micro-batches of the rollout."""
        columns = [
            [torch.cat([part[k] for part in parts]) for k in range(4)] for parts in self._kept
        ]
        stacked = [torch.stack([c[k] for c in columns], 1) for k in range(4)]
        return Trajectory(list(self.window), *stacked)


class TrajectoryUpdate(PolicyUpdate):
    """Flow-GRPO: all steps of the window, in one micro-batch of images at a time."""

    def __init__(
        self, model: TextToImageModel, config: FlowGRPOConfig, settings: UpdateSettings
    ) -> None:
        super().__init__(model, config, settings)
        self.config = config
        if model.costs_a_forward(settings.guidance_scale):
            raise UsageError(
                "rollout.guidance_scale: Flow-GRPO's likelihoods are those of the policy without guidance; leave it out"
            )
        steps = len(settings.grid)
        self.size = config.window_size or steps - 1
        self.last_start = max(0, round(config.window_stop * steps) - self.size)
        if self.size > steps:
            raise UsageError(
                f"algorithm.window_size: {self.size} steps do not fit into a rollout of {steps}"
            )

    @property
    def metrics(self) -> list[str]:
        return [*flow_grpo.METRICS, *(["kl"] if self.config.kl_beta else [])]

    def sampler(self, update: int) -> StochasticSampler:
        """The stochastic sampler of an update, with that update's window."""
        start = 0
        if self.config.window_size is not None:
            start = stream(WINDOW, self.settings.seed, update) % (self.last_start + 1)
        return StochasticSampler(self.config, range(start, start + self.size))

    def micro_batch(
        self,
        batch: TrainingBatch,
        rows: range,
        sums: Sums,
        *,
        key: tuple[int, int],
    ) -> Tensor:
        if batch.trajectory is None:
            raise ValueError("Flow-GRPO needs the trajectory of the rollout")
        config, part = self.config, batch.trajectory[rows.start : rows.stop]
        device, steps = part.latents.device, len(part.steps)
        repeat = batch.prompt_index[rows.start : rows.stop].repeat_interleave(steps)
        embeds = batch.embeds[repeat.to(device)]
        index = torch.tensor(part.steps).repeat(len(rows))
        latents, times = part.latents.flatten(0, 1), self.grid[index].to(device)
        advantages = batch.advantages[rows.start : rows.stop].repeat_interleave(steps).to(device)

        def step(policy: str) -> flow_grpo.StochasticStep:
            guidance = self.reference_guidance_scale if policy == lora.REFERENCE else None
            with lora.policy(self.model.denoiser, policy):
                pred = self.predict(latents, times, embeds, guidance)
            return flow_grpo.stochastic_step(
                pred,
                latents,
                self.settings.sigmas[index].to(device),
                self.settings.sigmas[index + 1].to(device),
                noise_level=config.noise_level,
                dynamics=config.dynamics,
            )

        current = step(lora.CURRENT)
        log_probs = flow_grpo.log_prob(
            part.next_latents.flatten(0, 1), current, dynamics=config.dynamics
        )
        # the first step on a rollout is on policy: exactly, and not up to the rounding of another batch size
        moved = key[1] > 0
        old = part.log_probs.flatten() if moved else log_probs.detach()
        old_mean = part.means.flatten(0, 1) if moved else current.mean.detach()
        ratio = flow_grpo.log_ratio(
            log_probs, old, step=current, old_mean=old_mean if config.guard else None
        )
        clipped = clip_advantages(
            advantages, clip=config.advantage_clip, maximum=config.advantage_clip
        )
        loss, metrics = flow_grpo.flow_grpo_loss(ratio, clipped, clip_range=config.clip_range)
        for name, values in metrics.items():
            sums.add(name, values)
        total = loss.sum() / (batch.total * steps)
        if config.kl_beta:
            with torch.no_grad():
                reference = step(lora.REFERENCE)
            distance = flow_grpo.reference_distance(current, reference)
            sums.add("kl", distance.detach())
            total = total + config.kl_beta * distance.sum() / (batch.kept * steps)
        return total
