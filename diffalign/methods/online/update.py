"""One policy update on a rollout: global loss, any micro-batch.

The loss is a mean over the images of the whole update. Each process adds up the gradients of its own images in
micro-batches of any size and the sums are reduced over processes, so that neither the micro-batch nor the number of
processes changes the gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign import lora
from diffalign.algorithms import advantages as adv
from diffalign.config import AlgorithmConfig
from diffalign.core.precision import attention
from diffalign.pipelines.base import TextToImageModel
from diffalign.training.denoise import predict
from diffalign.training.sums import Sums
from diffalign.types import PromptEmbeds, Trajectory


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
    trajectory: Trajectory | None = None


@dataclass(frozen=True)
class UpdateSettings:
    """What an update needs besides the algorithm.

    `grid` (N,) timesteps of the rollout from noise to clean, and `sigmas` (N + 1,) with the final 0; sizes, precision
    and seed of the run; `negative_embeds` of one prompt where the reference is guided by a second forward.
    """

    grid: Tensor
    sigmas: Tensor
    guidance_scale: float | None
    micro_batch_size: int
    mixed_precision: str
    seed: int
    updates_per_rollout: int = 1
    negative_embeds: PromptEmbeds | None = None


class PolicyUpdate(ABC):
    """Accumulates the gradient of a loss over a batch; the caller owns the optimizer."""

    rollout_policy: str = lora.CURRENT
    """The policy that makes the images."""

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
        """Names of the metrics."""

    @abstractmethod
    def rows(self, images: int) -> dict[bool, set[int]]:
        """Rows of the denoiser's forwards for a micro-batch of so many images, with gradient (True) and without."""

    @abstractmethod
    def micro_batch(
        self,
        batch: TrainingBatch,
        rows: range,
        sums: Sums,
        *,
        key: tuple[int, int],
    ) -> Tensor:
        """The share of the loss that these rows of the batch have; adds to the metrics. `key`: update, step in it."""

    def takes_part(self, advantages: Tensor, group: Tensor) -> Tensor:
        """Return which images (B,) take part in the loss; advantages (B,) are NaN for images without a reward."""
        return adv.informative(advantages, group)

    def sampler(self, update: int) -> Any:
        """A step for the rollout of an update, with a `trajectory()` to ask it for; None for the scheduler's own."""
        return None

    def lag_decay(self, update: int) -> float | None:
        """Decay of the lagged policy after update number `update` (from 1); None where there is no use for one."""
        return None

    def accumulate(self, batch: TrainingBatch, *, update: int, inner: int = 0) -> Sums:
        """Add this process's part of the gradient to the parameters' `.grad`; returns its sums of metrics.

        `inner` counts the steps on one rollout.
        """
        sums = Sums(self.metrics, batch.latents.device)
        size = self.settings.micro_batch_size
        for start in range(0, len(batch.image), size):
            rows = range(start, min(start + size, len(batch.image)))
            loss = self.micro_batch(batch, rows, sums, key=(update, inner))
            with attention(batch.latents.device):
                loss.backward()
        return sums

    def predict(
        self, noisy: Tensor, times: Tensor, embeds: PromptEmbeds, guidance: float | None = None
    ) -> Tensor:
        """`guidance` None is the policy's own."""
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
