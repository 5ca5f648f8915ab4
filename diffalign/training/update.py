"""One policy update on a rollout: global loss, any micro-batch.

The loss is a mean over the images of the whole update. Each process adds up the gradients of its own images in
micro-batches of any size and the sums are reduced over processes, so that neither the micro-batch nor the number of
processes changes the gradient. Noise and timesteps of an image come from a stream of its own for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign import lora
from diffalign.algorithms import awm, diffusion_nft, timesteps
from diffalign.algorithms.forward_process import ForwardSample, proximal_loss
from diffalign.config import ForwardProcessConfig
from diffalign.pipelines.base import TextToImageModel
from diffalign.precision import attention, compute
from diffalign.seeds import TIMESTEPS, stream
from diffalign.types import PromptEmbeds


@dataclass(frozen=True)
class TrainingBatch:
    """This process's share of an update, ready for the loss.

    `latents` (B, C, H, W); `prompt_index` (B,) rows of `embeds`; `advantages` (B,), not yet clipped; `image` (B,)
    numbers of the images within the update; `total` images of the whole update that have a reward, `kept` those that
    are trained on.
    """

    latents: Tensor
    embeds: PromptEmbeds
    prompt_index: Tensor
    advantages: Tensor
    image: list[int]
    total: int
    kept: int


FORWARD_PROCESS = {"awm": awm, "diffusion_nft": diffusion_nft}


class Sums:
    """Sums and counts of named metrics, kept on the device until they are read."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.table = torch.zeros(len(names), 2, device=device)
        self.names = list(names)

    def add(self, name: str, values: Tensor) -> None:
        row = self.table[self.names.index(name)]
        row += torch.stack([values.sum(), torch.full_like(values[0], values.numel())])

    def means(self) -> dict[str, float]:
        """Mean of each metric; of all processes, where `table` has been summed over them."""
        pairs = zip(self.names, self.table.tolist(), strict=True)
        return {name: total / max(count, 1) for name, (total, count) in pairs}


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
) -> Draws:
    """Timesteps, noise and the subset for the distances, image by image."""
    index, noise, pick = [], [], []
    for row in rows:
        generator = torch.Generator().manual_seed(stream(TIMESTEPS, *key, batch.image[row]))
        index.append(timesteps.draw(parts, generator=generator))
        noise.append(torch.randn(len(parts), *batch.latents.shape[1:], generator=generator))
        pick.append(torch.randperm(len(parts), generator=generator)[:kl_timesteps])
    return Draws(torch.stack(index), torch.stack(noise), torch.stack(pick))


class PolicyUpdate:
    """Accumulates the gradient of a forward-process loss over a batch; the caller owns the optimizer."""

    def __init__(
        self,
        model: TextToImageModel,
        config: ForwardProcessConfig,
        *,
        grid: Tensor,
        guidance_scale: float | None,
        micro_batch_size: int,
        mixed_precision: str,
        seed: int,
        negative_embeds: PromptEmbeds | None = None,
    ) -> None:
        self.algorithm: Any = FORWARD_PROCESS[config.type]
        self.model = model
        self.negative_embeds = negative_embeds
        self.config = config
        self.grid = grid.float().cpu()
        self.parts = timesteps.strata(
            len(grid),
            config.timesteps_per_image,
            start=config.timestep_start,
            stop=config.timestep_stop,
        )
        # Guidance that costs a second forward belongs to inference; an embedded one is part of the policy's input.
        self.guidance_scale = guidance_scale if model.guidance_is_embedded else None
        self.micro_batch_size = micro_batch_size
        self.mixed_precision = mixed_precision
        self.seed = seed
        self.distances = (
            ("kl", config.kl_beta, lora.REFERENCE),
            ("kl_lagged", config.ema_kl_beta, lora.LAGGED),
        )

    def accumulate(
        self, batch: TrainingBatch, *, update: int, inner: int = 0, off_policy: bool = False
    ) -> Sums:
        """Add this process's part of the gradient to the parameters' `.grad`; returns its sums of metrics.

        `off_policy`: the images were made by the lagged policy, whose predictions are then computed, too.
        """
        names = list(self.algorithm.METRICS)
        names += [name for name, weight, _ in self.distances if weight]
        sums = Sums(names, batch.latents.device)
        for start in range(0, len(batch.image), self.micro_batch_size):
            rows = range(start, min(start + self.micro_batch_size, len(batch.image)))
            draws = draw(
                batch,
                rows,
                self.parts,
                kl_timesteps=self.config.kl_timesteps,
                key=(self.seed, update, inner),
            )
            loss = self._micro_batch(batch, rows, draws, off_policy, sums)
            with attention(batch.latents.device):
                loss.backward()
        return sums

    def _micro_batch(
        self, batch: TrainingBatch, rows: range, draws: Draws, off_policy: bool, sums: Sums
    ) -> Tensor:
        model, config = self.model, self.config
        steps = config.timesteps_per_image
        device = batch.latents.device
        latents = batch.latents[rows.start : rows.stop].float().repeat_interleave(steps, 0)
        noise = draws.noise.flatten(0, 1).to(device)
        times = self.grid[draws.grid_index].flatten().to(device)
        embeds = batch.embeds[
            batch.prompt_index[rows.start : rows.stop].repeat_interleave(steps).to(device)
        ]
        advantages = batch.advantages[rows.start : rows.stop].repeat_interleave(steps).to(device)
        noisy = model.noise.add_noise(latents, noise, times)
        target = model.noise.target(latents, noise)
        sigmas = model.noise.sigmas(times)

        old = None
        if off_policy:
            with torch.no_grad(), lora.policy(model.denoiser, lora.LAGGED):
                old = self._predict(noisy, times, embeds)
        pred = self._predict(noisy, times, embeds)
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
            guidance = config.reference_guidance_scale if policy == lora.REFERENCE else None
            with torch.no_grad(), lora.policy(model.denoiser, policy):
                other = self._predict(noisy[picked], times[picked], embeds[picked], guidance)
            distance = proximal_loss(pred[picked], other)
            sums.add(name, distance.detach())
            # a mean over the picked timesteps has the expectation of the mean over all of them
            total = total + weight * distance.sum() / (batch.kept * config.kl_timesteps)
        return total

    def _predict(
        self, noisy: Tensor, times: Tensor, embeds: PromptEmbeds, guidance: float | None = None
    ) -> Tensor:
        """`guidance` None is the policy's own."""
        negative = None
        if guidance is None:
            guidance = self.guidance_scale
        elif self.negative_embeds is not None:
            negative = self.negative_embeds[torch.zeros(len(noisy), dtype=torch.long)]
        if self.mixed_precision == "no":  # without autocast inputs must have the dtype of the base
            noisy = noisy.to(embeds.prompt_embeds.dtype)
        with compute(noisy.device, self.mixed_precision):
            return self.model.predict(
                noisy, times, embeds, guidance_scale=guidance, negative_embeds=negative
            )
