"""Loading of the rewards that --rewards names.

The module imports numpy, so verbs import it inside `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.core import console
from diffalign.data.images import CaptionedImage
from diffalign.rewards.composition import CompositeReward


def load_rewards(names: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> CompositeReward:
    """Load rewards by name, and check that they can score prompts with this metadata."""
    reward = _with_equal_weights(names)
    reward.check_metadata(metadata)
    reward.prepare()
    return reward


def load_usable_rewards(names: Sequence[str], images: Sequence[CaptionedImage]) -> CompositeReward:
    """Load the named rewards that can score the images.

    The others are left out, with a message that gives the reason.
    """
    reward = _with_equal_weights(names)
    texts, metadata = [i.prompt.text for i in images], [i.prompt.metadata for i in images]
    for name, reason in reward.leave_out_unusable(texts, metadata).items():
        print(f"{name} is left out: {reason}", file=console.stderr())
    return reward


def _with_equal_weights(names: Sequence[str]) -> CompositeReward:
    return CompositeReward.from_config(dict.fromkeys(names, 1.0), setting="rewards")
