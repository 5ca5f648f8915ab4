"""The interface of rewards: a score of images for prompts, and its provenance."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)
Metadata = Mapping[str, Any]


class RewardError(UserError, RuntimeError):
    """No image at all could be scored, or a reward cannot work with these prompts."""


@dataclass(frozen=True)
class RewardCard:
    """The account: a run records it beside its numbers."""

    name: str
    description: str
    model_id: str | None = None
    """Hub id of the weights; None for a reward without weights."""
    revision: str | None = None
    """Commit of that repository. Where only a loaded model knows it, `prepare` writes it here."""
    auxiliary: Mapping[str, str | None] = field(default_factory=dict)
    """Hub ids and commits of further parts, such as a tokenizer or a head."""
    input_size: int | None = None
    """Pixels per side that the model sees; None for the image's own size."""
    raw_range: tuple[float, float] | None = (0.0, 1.0)
    """Least and largest raw score; None where nobody knows."""
    scale: float = 1.0
    offset: float = 0.0
    """Normalised reward = (raw - offset) * scale, about 1 for ordinary images."""
    license: str = "Apache-2.0"


class Reward(ABC):
    """Subclass, set `card`, implement `score`; see CONTRIBUTING."""

    card: ClassVar[RewardCard]
    required_metadata: ClassVar[tuple[str, ...]] = ()
    """Keys that every prompt's metadata must have."""
    needs_prompt: ClassVar[bool] = False
    """The prompt's text decides: without one a score means nothing."""

    def prepare(self) -> None:  # noqa: B027 - most rewards have nothing to load
        """Load what the reward needs, before the first image. RewardError where it is not to be had."""

    @abstractmethod
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Raw scores of B images.

        Args:
            images: (B, 3, H, W) uint8.
            prompts, metadata: B each.
        """

    def declare(self, **fields: Any) -> None:
        """Write on this instance's card what is not known before weights are loaded."""
        self.card = replace(self.card, **fields)  # type: ignore[misc]

    def normalize(self, raw: Any) -> Any:
        """Raw scale to the common one."""
        return (raw - self.card.offset) * self.card.scale

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        """RewardError naming the first prompt that lacks what this reward needs."""
        for row, entry in enumerate(metadata):
            missing = [key for key in self.required_metadata if key not in entry]
            if missing:
                raise RewardError(
                    f"reward {self.card.name!r} needs {', '.join(missing)} in every prompt's metadata; prompt "
                    f"{row + 1} ({entry.get('prompt', '')!r}) has none. Use a .jsonl prompt file in GenEval's format"
                )


def one_by_one(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> RewardOutput:
    """One bad image must not cost the batch: score each alone, NaN for those that fail."""
    from diffalign.rewards.function import as_output

    nothing = RewardOutput(np.full(1, np.nan, np.float32))
    parts = []
    for i in range(len(prompts)):
        one = slice(i, i + 1)
        try:
            value = reward.score(images[one], prompts[one], metadata[one])
            parts.append(as_output(value, n=1, name=reward.card.name))
        except Exception as error:
            logger.debug("image %d: %s", i, error)
            parts.append(nothing)
    return RewardOutput.cat(parts)
