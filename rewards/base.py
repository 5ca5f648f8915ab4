"""Interface of rewards: scores of images for prompts, and their provenance."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)
Metadata = Mapping[str, Any]


class RewardError(UserError, RuntimeError):
    """Reward that cannot score any image, or that does not support these prompts."""


@dataclass(frozen=True)
class RewardCard:
    """Description of a reward, which a run records with its scores."""

    name: str
    description: str
    model_id: str | None = None
    """Hub id of the weights; None for a reward without weights."""
    revision: str | None = None
    """Commit of the weights' repository; `prepare` sets it if only the loaded model knows it."""
    auxiliary: Mapping[str, str | None] = field(default_factory=dict)
    """Commits of further parts, such as a tokenizer or a head, by hub id."""
    input_size: int | None = None
    """Side in pixels of the model's input; None for the image's own size."""
    raw_range: tuple[float, float] | None = (0.0, 1.0)
    """Smallest and largest raw score; None if they are unknown."""
    scale: float = 1.0
    offset: float = 0.0
    """Offset of the normalised reward, (raw - offset) * scale, about 1 for ordinary images."""
    license: str = "Apache-2.0"


class Reward(ABC):
    """Base class of rewards; subclasses set `card` and implement `score` (see CONTRIBUTING)."""

    card: ClassVar[RewardCard]
    required_metadata: ClassVar[tuple[str, ...]] = ()
    """Keys that every prompt's metadata must have."""
    needs_prompt: ClassVar[bool] = False
    """True if the score depends on the prompt's text and needs one."""

    def prepare(self) -> None:  # noqa: B027 - most rewards have nothing to load
        """Load models before the first image.

        Raises:
            RewardError: a model cannot be loaded.
        """

    @abstractmethod
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Return the raw scores of B images.

        Args:
            images: (B, 3, H, W) uint8.
            prompts: B texts.
            metadata: B mappings.
        """

    def units(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the rows that are scored together.

        A fault in one unit leaves the others their scores.
        """
        return [[row] for row in range(len(prompts))]

    def declare(self, **fields: Any) -> None:
        """Set fields of this instance's card that are unknown before weights are loaded."""
        self.card = replace(self.card, **fields)  # type: ignore[misc]

    def normalize(self, raw: Any) -> Any:
        """Return raw scores on the common scale of all rewards."""
        return (raw - self.card.offset) * self.card.scale

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        """Raise RewardError for the first prompt whose metadata lacks a required key."""
        for row, entry in enumerate(metadata):
            missing = [key for key in self.required_metadata if key not in entry]
            if missing:
                raise RewardError(
                    f"reward {self.card.name!r} needs {', '.join(missing)} in every prompt's metadata; prompt "
                    f"{row + 1} ({entry.get('prompt', '')!r}) has none. Use a .jsonl prompt file in GenEval's format"
                )
