"""Captioned images as `diffalign precompute` leaves them: latents in the space that a model moves to, and of some of
them those in its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.data.shard_cache import ShardCache
from diffalign.types import PromptEmbeds


@dataclass(frozen=True)
class LatentBatch:
    """B images: `latents` (B, C, h, w) float32 in the new space, their prompts, and `base_latents` in the old one where
    all of them have such."""

    latents: Tensor
    embeds: PromptEmbeds
    base_latents: Tensor | None = None


class LatentCache(ShardCache):
    """One row an image."""

    rows = "images"
    setting = "latents.cache"

    def batch(
        self, images: Sequence[int], device: torch.device | str = "cpu", *, paired: bool = False
    ) -> LatentBatch:
        """Images by their numbers; with their latents in the old space only where asked for."""
        columns, embeds = self.columns(images, device, without=() if paired else ("base_latents",))
        base = columns.get("base_latents")
        return LatentBatch(
            columns["latents"].float(), embeds, None if base is None else base.float()
        )

    @property
    def paired(self) -> list[int]:
        """Numbers of the images that have latents in both spaces."""
        return [i for i, paired in enumerate(self.index["paired"]) if paired]
