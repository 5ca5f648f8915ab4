"""Rewards of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.core.errors import UsageError
from diffalign.data.images import CaptionedImage
from diffalign.rewards.composition import CompositeReward


def load_rewards(names: str, metadata: Sequence[Mapping[str, Any]]) -> CompositeReward:
    """From names between commas, ready to score prompts with this metadata."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise UsageError("--rewards names none")
    reward = CompositeReward.from_config(dict.fromkeys(chosen, 1.0))
    reward.check_metadata(metadata)
    reward.prepare()
    return reward


def check_captions(reward: CompositeReward, images: Sequence[CaptionedImage], folder: Path) -> None:
    """UsageError where rewards judge by the prompt and no image has one."""
    blind = [n for n, r in reward.rewards.items() if r.needs_prompt]
    if blind and not any(i.prompt.text for i in images):
        raise UsageError(
            f"{', '.join(blind)} needs captions, and no image of {folder} has one; see docs/rewards.md"
        )
