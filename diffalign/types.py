"""The small records that travel between the rooms. Shapes stand in the docstrings; B is a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """What a text encoder says of B prompts, in the form that one model family understands.

    `prompt_embeds` (B, S, D), `pooled_prompt_embeds` (B, P) or None for families without it; `time_ids` (B, 6) or None:
    SDXL's original height and width, top and left of the crop, target height and width, in pixels;
    `prompt_attention_mask` (B, S), 1 where a token counts, or None for families that mask nothing.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    prompt_attention_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def _map(self, change: Callable[[Tensor], Tensor]) -> PromptEmbeds:
        changed: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            part = getattr(self, name)
            changed[name] = None if part is None else change(part)
        return PromptEmbeds(**changed)

    def __getitem__(self, index: Any) -> PromptEmbeds:
        """Rows by slice, mask or (N,) index tensor."""
        return self._map(lambda part: part[index])

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbeds:
        """As `Tensor.to`, on every part."""
        return self._map(lambda part: part.to(*args, **kwargs))

    def repeat_first(self, n: int) -> PromptEmbeds:
        """The first prompt `n` times: one null prompt for a whole batch."""
        import torch

        return self[torch.zeros(n, dtype=torch.long)]

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """In a row; what one of them lacks, all lack."""
        import torch

        found: dict[str, Any] = {}
        for name in (f.name for f in fields(PromptEmbeds)):
            column = [getattr(p, name) for p in parts]
            found[name] = None if any(c is None for c in column) else torch.cat(column)
        return PromptEmbeds(**found)


@dataclass(frozen=True)
class PreferenceBatch:
    """B pairs, the preferred image first.

    `latents` (B, 2, C, H, W); `embeds` of B prompts; `preference` (B,) in 0.5..1; `weight` (B,); `pair` their numbers
    in the cache. Inverted by the reference, where the cache has it: `states` (B, 2, K, C, H, W) at `grid_index` (B, K)
    of the rising grid, and `reference_error` (B, 2, K), its error there. `time_ids` (B, 2, 6), where the family has
    them.
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

    def __getitem__(self, rows: slice) -> PreferenceBatch:
        found: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            part = getattr(self, name)
            found[name] = None if part is None else part[rows]
        return PreferenceBatch(**found)


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of B images. `values` (B,) float32, NaN where a reward could not be computed; `details` holds further
    (B,) arrays, such as `correct` or the parts of a composition."""

    values: np.ndarray
    details: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def mask(self) -> np.ndarray:
        """(B,) bool: where the reward is usable."""
        return np.isfinite(self.values)

    @classmethod
    def cat(cls, parts: Sequence[RewardOutput]) -> RewardOutput:
        """Parts in a row; a detail that a part lacks is NaN there."""
        names = dict.fromkeys(name for part in parts for name in part.details)
        details = {
            name: np.concatenate(
                [p.details.get(name, np.full(len(p.values), np.nan, np.float32)) for p in parts]
            )
            for name in names
        }
        return cls(np.concatenate([p.values for p in parts]), details)


def no_reward(images: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardOutput:
    """The score of those who only want images."""
    return RewardOutput(np.zeros(len(prompts), np.float32))


@dataclass(frozen=True)
class Trajectory:
    """K steps of B rollouts, one after the other, that are trained on: `steps`, their numbers on the grid; `latents`
    (B, K + 1, C, H, W), before the first of them and after each."""

    steps: list[int]
    latents: Tensor

    def __getitem__(self, rows: Any) -> Trajectory:
        return Trajectory(self.steps, self.latents[rows])


@dataclass(frozen=True)
class Rollout:
    """What an algorithm keeps of B generated images: clean latents, and a trajectory only where its loss needs one.

    `latents` (B, C, H, W); `prompt_index` (B,) long, row of each image's prompt in `embeds`; `group` (B,) long, the
    images with the same number compete with each other; `rewards` (B,) float32 with NaN for failures.
    """

    latents: Tensor
    embeds: PromptEmbeds
    prompt_index: torch.Tensor
    group: torch.Tensor
    rewards: torch.Tensor
    details: dict[str, np.ndarray] = field(default_factory=dict)
    trajectory: Trajectory | None = None
