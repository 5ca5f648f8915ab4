"""Cache of captioned images that `diffalign precompute` encoded.

Every image has latents in the new space of a model, and some have latents in its old space, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.data.shard_cache import ShardCache
from diffalign.types import PromptEmbeds


@dataclass(frozen=True)
class LatentBatch:
    """Batch of B captioned images.

    Attributes:
        latents: (B, C, h, w) float32, in the new space.
        embeds: embeddings of the captions.
        base_latents: latents in the old space if all images have them, else None.
    """

    latents: Tensor
    embeds: PromptEmbeds
    base_latents: Tensor | None = None


class LatentCache(ShardCache):
    """Cache with one row per image."""

    rows = "images"
    setting = "latents.cache"

    def batch(
        self, images: Sequence[int], device: torch.device | str = "cpu", *, paired: bool = False
    ) -> LatentBatch:
        """Return images by number; `paired` adds their latents in the old space."""
        columns, embeds = self.columns(images, device, without=() if paired else ("base_latents",))
        base = columns.get("base_latents")
        return LatentBatch(
            columns["latents"].float(), embeds, None if base is None else base.float()
        )

    @property
    def paired(self) -> list[int]:
        """Numbers of the images that have latents in both spaces."""
        return [i for i, paired in enumerate(self.index["paired"]) if paired]
