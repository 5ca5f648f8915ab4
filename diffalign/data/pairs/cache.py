"""Cache of preference pairs that `diffalign precompute` encoded.

It holds latents of both images, and states of their inversion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffalign.data.shard_cache import ShardCache
from diffalign.types import PreferenceBatch

OPTIONAL = ("states", "grid_index", "reference_error", "time_ids", "mask")


class PairCache(ShardCache):
    """Cache with one row per pair."""

    rows = "pairs"
    setting = "pairs.cache"

    def batch(self, pairs: Sequence[int], device: torch.device | str = "cpu") -> PreferenceBatch:
        """Return pairs by number, with latents and states in float32."""
        columns, embeds = self.columns(pairs, device)
        floats = {
            k: v if k == "grid_index" else v.float() for k, v in columns.items() if k in OPTIONAL
        }
        return PreferenceBatch(
            columns["latents"].float(),
            embeds,
            columns["preference"],
            columns["weight"],
            list(pairs),
            **floats,
        )
