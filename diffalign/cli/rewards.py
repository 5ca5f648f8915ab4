"""The rewards that --rewards names. Imports numpy: verbs import it inside `run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.core.errors import UsageError
from diffalign.rewards.composition import CompositeReward


def load_rewards(names: str, metadata: Sequence[Mapping[str, Any]]) -> CompositeReward:
    """Load comma-separated rewards, ready to score prompts with this metadata."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise UsageError("--rewards names none")
    reward = CompositeReward.from_config(dict.fromkeys(chosen, 1.0))
    reward.check_metadata(metadata)
    reward.prepare()
    return reward
