"""Masks of preference pairs, which say where two images are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.data.images import read_image
from diffalign.data.pairs.records import PreferencePair


@dataclass(frozen=True)
class Ready:
    """Pair whose images are read.

    Attributes:
        pair: the pair, the preferred image first.
        pixels: (2, 3, H, W) uint8.
        time_ids: (2, 6).
        mask: (3, H, W) uint8, white where the pair is compared; None for a pair that counts as a whole.
    """

    pair: PreferencePair
    pixels: Tensor
    time_ids: Tensor
    mask: Tensor | None = None

    def latent_mask(self, height: int, width: int) -> Tensor:
        """Return the share of white (1, H, W) in the area of each latent."""
        if self.mask is None:
            return torch.ones(1, height, width)
        white = self.mask.float().mean(0, keepdim=True) / 255
        return F.adaptive_avg_pool2d(white, (height, width))


def mask_of(pair: PreferencePair, pixels: list[Tensor]) -> Tensor | str | None:
    """Return the pixels (3, H, W) of a pair's mask, or None without a mask.

    Return the reason as a text if the pair cannot be used.
    """
    if pair.mask is None:
        return None
    try:
        mask = read_image(pair.mask)
    except OSError:
        return "unreadable mask"
    if any(mask.shape != image.shape for image in pixels):
        return "mask of another size than its images"
    return mask if mask.any() else "black mask"
