"""Loading of the rewards that --rewards names.

The module imports numpy, so verbs import it inside `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.core import console
from diffalign.core.errors import UsageError
from diffalign.data.images import CaptionedImage
from diffalign.rewards.composition import CompositeReward


def load_rewards(names: str, metadata: Sequence[Mapping[str, Any]]) -> CompositeReward:
    """Load comma-separated rewards, and check that they can score prompts with this metadata."""
    reward = _choose(names)
    reward.check_metadata(metadata)
    reward.prepare()
    return reward


def load_usable_rewards(names: str, images: Sequence[CaptionedImage]) -> CompositeReward:
    """Load the comma-separated rewards that can score the images.

    The others are left out, with a message that gives the reason.
    """
    reward = _choose(names)
    texts, metadata = [i.prompt.text for i in images], [i.prompt.metadata for i in images]
    for name, reason in reward.leave_out_unusable(texts, metadata).items():
        print(f"{name} is left out: {reason}", file=console.stderr())
    return reward


def _choose(names: str) -> CompositeReward:
    selected = [name.strip() for name in names.split(",") if name.strip()]
    if not selected:
        raise UsageError("rewards: names none")
    return CompositeReward.from_config(dict.fromkeys(selected, 1.0), setting="rewards")
