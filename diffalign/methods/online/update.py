"""Base class of policy updates, which compute the gradient of a loss on a rollout.

The loss is a mean over the images of the whole update. Each process sums the gradients of its own images in
micro-batches of any size, and the sums are reduced over processes. Neither the micro-batch size nor the number of
processes changes the gradient, up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign import lora
from diffalign.algorithms import advantages as adv
from diffalign.config import AlgorithmConfig
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.training.denoise import predict
from diffalign.training.sums import Sums, accumulate, micro_batches
from diffalign.types import PromptEmbeds, Trajectory


@dataclass(frozen=True)
class TrainingBatch:
    """Images of an update that this process trains on, ready for the loss.

    Attributes:
        latents: clean latents (B, C, H, W) of the rollout.
        embeds: embeddings of the update's prompts.
        prompt_index: row in `embeds` of each image (B,).
        advantages: advantage of each image (B,), not yet clipped.
        image: index of each image within the update (B,).
        total: number of images of the whole update, over all processes, that have a reward.
        trained: number of images of the whole update, over all processes, that are trained on.
        trajectory: states of the rollout, for algorithms that train on them.
        old_log_probs: log-probabilities (B, K) of the rollout's stochastic steps under the policy that sampled them.
            The first optimizer step on the rollout fills them in.
        old_means: means (B, K, C, H, W) of these steps, filled in likewise.
        partner: clean latents (B, C, H, W) of the other image of each pair, for losses on pairs.
    """

    latents: Tensor
    embeds: PromptEmbeds
    prompt_index: Tensor
    advantages: Tensor
    image: list[int]
    total: int
    trained: int
    trajectory: Trajectory | None = None
    old_log_probs: Tensor | None = None
    old_means: Tensor | None = None
    partner: Tensor | None = None


def own_part(table: Tensor) -> Tensor:
    """Return a table as it is: the sum over the processes of a run with one process."""
    return table


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of an update that do not belong to its algorithm.

    Attributes:
        grid: timesteps (N,) of the rollout, from noise to clean.
        sigmas: noise levels (N + 1,) of the rollout, with the final 0.
        guidance_scale: guidance scale of the rollout.
        micro_batch_size: images per micro-batch of training.
        mixed_precision: "bf16" for autocast, or "no".
        seed: seed of the run.
        updates_per_rollout: optimizer steps per rollout.
        negative_embeds: embedding of the negative prompt (1 row), if guidance of the reference costs a second forward.
        sum_processes: returns the sum of a tensor over all processes.
    """

    grid: Tensor
    sigmas: Tensor
    guidance_scale: float | None
    micro_batch_size: int
    mixed_precision: str
    seed: int
    updates_per_rollout: int = 1
    negative_embeds: PromptEmbeds | None = None
    sum_processes: Callable[[Tensor], Tensor] = own_part


class PolicyUpdate(ABC):
    """Accumulator of the gradient of a loss over a batch. The caller owns the optimizer."""

    rollout_policy: str = lora.CURRENT
    """Name of the policy that samples the rollout."""
    kl_factor: float = 1.0
    """Factor of the weight of the distance to the reference."""
    paired: bool = False
    """True if the images of a prompt are pairs that share their initial noise."""

    def __init__(
        self, model: TextToImageModel, config: AlgorithmConfig, settings: UpdateSettings
    ) -> None:
        self.model = model
        self.settings = settings
        self.grid = settings.grid.float().cpu()
        # Guidance that costs a second forward belongs to inference; an embedded one is part of the policy's input.
        self.guidance_scale = settings.guidance_scale if model.guidance_is_embedded else None
        self.reference_guidance_scale = config.reference_guidance_scale

    @property
    @abstractmethod
    def metrics(self) -> list[str]:
        """Names of the metrics in the log."""

    @abstractmethod
    def sizes(self, images: int) -> CompiledSizes:
        """Return the batch sizes of the denoiser's forwards for a micro-batch of `images`."""

    @abstractmethod
    def micro_batch(
        self,
        batch: TrainingBatch,
        rows: range,
        sums: Sums,
        *,
        update: int,
        inner: int,
    ) -> Tensor:
        """Return the loss of some rows of the batch, and add their metrics to `sums`.

        The loss is their share of the mean over the whole update.

        Args:
            update: number of the update, from 1.
            inner: number of the optimizer step on the rollout, from 0.
        """

    def begin_rollout(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch with room for what the first optimizer step stores in it."""
        return batch

    def begin_step(self, batch: TrainingBatch, *, update: int, inner: int) -> None:  # noqa: B027
        """Compute what the micro-batches of an optimizer step share. All processes call it."""

    def takes_part(self, advantages: Tensor, group: Tensor) -> Tensor:
        """Return a mask (B,) of the images that take part in the loss.

        Args:
            advantages: advantages (B,), NaN for images without a reward.
            group: index of each image's prompt (B,).
        """
        return adv.informative(advantages, group)

    def sampler(self, update: int) -> Any:
        """Return a sampling step that records the rollout of an update.

        Its method `trajectory()` returns the recorded states. None stands for the scheduler's own step.
        """
        return None

    def decays(self, update: int) -> dict[str, float]:
        """Return the decay of each policy that follows the current one.

        Args:
            update: number of the finished update, from 1.
        """
        return {}

    def accumulate(self, batch: TrainingBatch, *, update: int, inner: int = 0) -> Sums:
        """Add this process's part of the gradient to the parameters' `.grad`.

        Args:
            update: number of the update, from 1.
            inner: number of the optimizer step on the rollout, from 0.

        Returns:
            This process's sums of metrics.
        """
        sums = Sums(self.metrics, batch.latents.device)
        self.begin_step(batch, update=update, inner=inner)
        accumulate(
            micro_batches(len(batch.image), self.settings.micro_batch_size),
            lambda rows: self.micro_batch(batch, rows, sums, update=update, inner=inner),
            batch.latents.device,
        )
        return sums

    def predict(
        self, noisy: Tensor, times: Tensor, embeds: PromptEmbeds, guidance: float | None = None
    ) -> Tensor:
        """Return the prediction (B, C, H, W). The guidance scale None is the policy's own."""
        negative, negatives = None, self.settings.negative_embeds
        if guidance is None:
            guidance = self.guidance_scale
        elif negatives is not None:
            negative = negatives.repeat_first(len(noisy))
        return predict(
            self.model,
            noisy,
            times,
            embeds,
            mixed_precision=self.settings.mixed_precision,
            guidance_scale=guidance,
            negative_embeds=negative,
        )
