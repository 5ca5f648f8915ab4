"""Image preprocessing of CLIP-like models on uint8 tensors: bit for bit what Pillow makes of the same pixels, in
batches and on any device, without a trip through Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

PRECISION_BITS = 22
"""Pillow's weights are integers in units of 2^-22."""
BICUBIC_SUPPORT = 2.0


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@lru_cache(maxsize=64)
def _weights(before: int, after: int) -> Tensor:
    """(after, before) float64 integers: Pillow's fixed-point weights of one axis (libImaging/Resample.c)."""
    scale = before / after
    stretch = max(scale, 1.0)
    support = BICUBIC_SUPPORT * stretch
    table = torch.zeros(after, before, dtype=torch.float64)
    for row in range(after):
        center = (row + 0.5) * scale
        low = max(0, int(center - support + 0.5))
        high = min(before, int(center + support + 0.5))
        found = [_bicubic((x - center + 0.5) / stretch) for x in range(low, high)]
        total = sum(found)
        fixed = [v / total * (1 << PRECISION_BITS) for v in found]
        table[row, low:high] = torch.tensor([math.trunc(v + math.copysign(0.5, v)) for v in fixed])
    return table


def _along_width(images: Tensor, width: int) -> Tensor:
    """(..., W) uint8 to (..., width); sums of 255 x 2^22 x taps are exact in float64."""
    if images.shape[-1] == width:
        return images
    weights = _weights(images.shape[-1], width).to(images.device)
    sums = images.double() @ weights.T
    return (
        ((sums + (1 << (PRECISION_BITS - 1))) / (1 << PRECISION_BITS)).floor().clamp(0, 255).byte()
    )


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) uint8 to (B, C, height, width) uint8, equal to `PIL.Image.resize(..., BICUBIC)` bit for bit.

    Unless one side grows and the other shrinks: newer versions of Pillow then resize the height first.
    """
    across = _along_width(images, width)
    return _along_width(across.transpose(-1, -2), height).transpose(-1, -2)


@dataclass(frozen=True)
class Preprocessing:
    """The shortest side to `size` by bicubic interpolation, the central square of it, then (x / 255 - mean) / std."""

    size: int = 224
    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, size, size) uint8."""
        height, width = images.shape[-2:]
        short = min(height, width)
        height, width = (int(self.size * side / short) for side in (height, width))
        top, left = (height - self.size) // 2, (width - self.size) // 2
        resized = resize_bicubic(images, height, width)
        return resized[..., top : top + self.size, left : left + self.size]

    def __call__(self, images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, size, size) normalised."""
        mean, std = (
            torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return ((self.pixels(images).float() / 255 - mean) / std).to(dtype)
