"""Records that the packages exchange.

The docstrings give shapes; B is the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Size = tuple[int, int]
"""Size of an image: (height, width) in pixels."""


@dataclass(frozen=True)
class PromptEmbeds:
    """Text embeddings of B prompts, in the form of one model family.

    Attributes:
        prompt_embeds: (B, S, D). Shorter prompts are padded with zeros to the longest, and have a mask.
        pooled_prompt_embeds: (B, P), or None for families without it.
        time_ids: (B, 6), SDXL's original height and width, top and left of the crop, target height and width, in
            pixels; None for other families.
        prompt_attention_mask: (B, S), 1 for tokens that count; None for families that mask nothing.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    prompt_attention_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each prompt that count, which are the first ones."""
        if self.prompt_attention_mask is None:
            return [self.prompt_embeds.shape[1]] * len(self)
        lengths: list[int] = self.prompt_attention_mask.sum(1).long().tolist()
        return lengths

    def _map(self, change: Callable[[Tensor], Tensor]) -> PromptEmbeds:
        changed: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            part = getattr(self, name)
            changed[name] = None if part is None else change(part)
        return PromptEmbeds(**changed)

    def __getitem__(self, index: Any) -> PromptEmbeds:
        """Return the rows that a slice, a mask or an index tensor (N,) selects."""
        return self._map(lambda part: part[index])

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbeds:
        """Return a copy after `Tensor.to` on every tensor."""
        return self._map(lambda part: part.to(*args, **kwargs))

    def repeat_first(self, n: int) -> PromptEmbeds:
        """Return the first prompt `n` times, such as one null prompt for a whole batch."""
        import torch

        return self[torch.zeros(n, dtype=torch.long)]

    def padded(self, length: int) -> PromptEmbeds:
        """Return the embeddings with zeros, which the mask excludes, up to `length` tokens.

        Raises:
            ValueError: the embeddings are shorter and have no mask.
        """
        import torch.nn.functional as F

        missing = length - self.prompt_embeds.shape[1]
        if not missing:
            return self
        if self.prompt_attention_mask is None:
            raise ValueError(
                f"prompt_embeds of {self.prompt_embeds.shape[1]} tokens cannot become {length} tokens long: they have "
                "no mask. Encode all prompts to one length, or with a mask."
            )
        return replace(
            self,
            prompt_embeds=F.pad(self.prompt_embeds, (0, 0, 0, missing)),
            prompt_attention_mask=F.pad(self.prompt_attention_mask, (0, missing)),
        )

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Concatenate embeddings, padded to the longest.

        A tensor that one of them lacks is None in the result.
        """
        import torch

        length = max(part.prompt_embeds.shape[1] for part in parts)
        parts = [part.padded(length) for part in parts]
        tensors: dict[str, Any] = {}
        for name in (f.name for f in fields(PromptEmbeds)):
            column = [getattr(p, name) for p in parts]
            tensors[name] = None if any(c is None for c in column) else torch.cat(column)
        return PromptEmbeds(**tensors)


@dataclass(frozen=True)
class DenoisingBatch:
    """Noisy latents with the predictions that are right for them, in B rows.

    Attributes:
        noisy: noisy latents (B, C, H, W).
        timesteps: timesteps (B,).
        target: targets (B, C, H, W) of the predictions.
        embeds: embeddings of the prompts (B rows).
        guidance_scale: guidance scales (B,) that are an input of the model, or None.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    embeds: PromptEmbeds
    guidance_scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.noisy)

    def __getitem__(self, rows: Any) -> DenoisingBatch:
        """Return the rows that a slice, a mask or an index tensor (N,) selects."""
        guidance = None if self.guidance_scale is None else self.guidance_scale[rows]
        return DenoisingBatch(
            self.noisy[rows], self.timesteps[rows], self.target[rows], self.embeds[rows], guidance
        )


@dataclass(frozen=True)
class PreferenceBatch:
    """Batch of B preference pairs, the preferred image first.

    Attributes:
        latents: (B, 2, C, H, W).
        embeds: embeddings of the B prompts.
        preference: (B,), probability that the first image is preferred, in 0.5..1.
        weight: (B,), weight of each pair in the loss.
        pair: numbers of the pairs in the cache.
        states: (B, 2, K, C, H, W), states inverted by the reference model, if the cache has them.
        grid_index: (B, K), positions of `states` on the rising grid.
        reference_error: (B, 2, K), error of the reference model at `states`.
        time_ids: (B, 2, 6), for families that use them.
        mask: (B, 1, H, W), weights of the latents' places in 0..1, if the cache has them.
    """

    latents: Tensor
    embeds: PromptEmbeds
    preference: Tensor
    weight: Tensor
    pair: list[int]
    states: Tensor | None = None
    grid_index: Tensor | None = None
    reference_error: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None

    def __getitem__(self, rows: slice) -> PreferenceBatch:
        parts: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            part = getattr(self, name)
            parts[name] = None if part is None else part[rows]
        return PreferenceBatch(**parts)


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of B images.

    Attributes:
        values: (B,) float32, NaN for an image whose reward could not be computed.
        details: further (B,) arrays, such as `correct` or the parts of a composition.
    """

    values: np.ndarray
    details: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def mask(self) -> np.ndarray:
        """Mask (B,) bool of the images with a usable reward."""
        usable: np.ndarray = np.isfinite(self.values)
        return usable

    @classmethod
    def cat(cls, parts: Sequence[RewardOutput]) -> RewardOutput:
        """Concatenate rewards; a detail that a part lacks is NaN for its images."""
        names = dict.fromkeys(name for part in parts for name in part.details)
        details = {
            name: np.concatenate(
                [p.details.get(name, np.full(len(p.values), np.nan, np.float32)) for p in parts]
            )
            for name in names
        }
        return cls(np.concatenate([p.values for p in parts]), details)


def no_reward(images: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardOutput:
    """Return zero for every image, to generate images without scoring them."""
    return RewardOutput(np.zeros(len(prompts), np.float32))


@dataclass(frozen=True)
class Trajectory:
    """Recorded consecutive steps of B rollouts that are trained on.

    Attributes:
        steps: numbers of the K steps on the timestep grid.
        latents: (B, K + 1, C, H, W), before the first step and after each step.
    """

    steps: list[int]
    latents: Tensor

    def __getitem__(self, rows: Any) -> Trajectory:
        return Trajectory(self.steps, self.latents[rows])


@dataclass(frozen=True)
class Rollout:
    """Rollout of B generated images, as an online algorithm trains on them.

    Attributes:
        latents: (B, C, H, W), clean.
        embeds: embeddings of the prompts.
        prompt_index: (B,) long, row of each image's prompt in `embeds`.
        group: (B,) long; images with the same number are compared with each other.
        rewards: (B,) float32, NaN for images that could not be scored.
        details: further (B,) arrays of the rewards.
        trajectory: recorded steps, only for losses that need them.
    """

    latents: Tensor
    embeds: PromptEmbeds
    prompt_index: torch.Tensor
    group: torch.Tensor
    rewards: torch.Tensor
    details: dict[str, np.ndarray] = field(default_factory=dict)
    trajectory: Trajectory | None = None
