"""Image preprocessing of CLIP-like models on uint8 tensors.

Results equal Pillow's bit for bit, and are computed in batches on any device without Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

PRECISION_BITS = 22
"""Fraction bits of Pillow's weights, which are integers in units of 2^-22."""
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
BAND = 32
"""Number of result pixels per matrix product, small enough to skip most zero weights."""
CHUNK = 16_000_000
"""Number of values that are resized at a time.

Each value needs eight bytes in each of a few copies.
"""


def _kernel(x: float, resample: str, a: float = -0.5) -> float:
    x = abs(x)
    if resample == "bilinear":
        return max(0.0, 1 - x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@lru_cache(maxsize=64)
def _weights(before: int, after: int, start: int, count: int, resample: str) -> Tensor:
    """Return Pillow's fixed-point weights of one axis, (count, before) integers in float64.

    They resize `before` to `after` pixels, for `count` result pixels from `start` on. Source: libImaging/Resample.c.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    support = SUPPORT[resample] * stretch
    table = torch.zeros(count, before, dtype=torch.float64)
    for row in range(count):
        center = (start + row + 0.5) * scale
        low = max(0, int(center - support + 0.5))
        high = min(before, int(center + support + 0.5))
        taps = [_kernel((x - center + 0.5) / stretch, resample) for x in range(low, high)]
        total = sum(taps)
        fixed = [v / total * (1 << PRECISION_BITS) for v in taps]
        table[row, low:high] = torch.tensor([math.trunc(v + math.copysign(0.5, v)) for v in fixed])
    return table


@lru_cache(maxsize=64)
def _bands(
    before: int, after: int, start: int, count: int, resample: str, device: torch.device
) -> list[tuple[slice, Tensor]]:
    """Split the table of `_weights` into bands of BAND rows.

    A band is the slice of its columns that are not zero, and their weights (columns, rows).
    """
    table = _weights(before, after, start, count, resample)
    bands = []
    for rows in table.split(BAND):
        used = rows.any(0).nonzero().flatten()
        columns = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((columns, rows[:, columns].T.contiguous().to(device)))
    return bands


def _along_width(images: Tensor, width: int, start: int, count: int, resample: str) -> Tensor:
    """Resize (..., W) uint8 to `width` columns, and return `count` of them from `start` on."""
    # sums of 255 x 2^22 x taps are exact in float64
    if images.shape[-1] == width:
        return images[..., start : start + count]
    bands = _bands(images.shape[-1], width, start, count, resample, images.device)
    sums = torch.cat([images[..., columns].double() @ w for columns, w in bands], -1)
    sums = (sums + (1 << (PRECISION_BITS - 1))) / (1 << PRECISION_BITS)
    return sums.floor().clamp(0, 255).byte()


def resize(
    images: Tensor,
    height: int,
    width: int,
    *,
    resample: str = "bicubic",
    crop: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Resize images (B, C, H, W) uint8, bit for bit like `PIL.Image.resize`.

    The result differs if one side grows and the other shrinks, because newer versions of Pillow then resize the height
    first.

    Args:
        resample: "bicubic" or "bilinear".
        crop: (top, left, height, width), the only part of the result to compute.

    Returns:
        Images (B, C, height, width) uint8, or the crop of them.
    """
    top, left, rows, columns = crop or (0, 0, height, width)
    parts = []
    for part in images.split(max(1, CHUNK // images[0].numel())):
        across = _along_width(part, width, left, columns, resample).transpose(-1, -2)
        parts.append(_along_width(across, height, top, rows, resample).transpose(-1, -2))
    return torch.cat(parts)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of CLIP: resize the shortest side to `size`, crop the central square.

    Interpolation is bicubic. Pixels become (x / 255 - mean) / std.
    """

    size: int = 224
    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD

    def pixels(self, images: Tensor) -> Tensor:
        """Resize and crop images (B, 3, H, W) uint8 to (B, 3, size, size) uint8."""
        height, width = images.shape[-2:]
        short = min(height, width)
        height, width = (int(self.size * side / short) for side in (height, width))
        crop = ((height - self.size) // 2, (width - self.size) // 2, self.size, self.size)
        return resize(images, height, width, crop=crop)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, size, size) float32, normalised."""
        return self.normalize(self.pixels(images).float() / 255)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, H, W) in 0..1."""
        mean, std = (
            torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (images - mean) / std


@dataclass(frozen=True)
class LetterboxPreprocessing(Preprocessing):
    """Preprocessing of HPS: resize the longest side to `size`, pad with black to a square.

    Interpolation is bicubic and antialiased, on floats.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, size, size) float32, normalised."""
        pixels = images.float() / 255
        height, width = images.shape[-2:]
        scale = self.size / max(height, width)
        if scale != 1:
            inner = (max(1, round(height * scale)), max(1, round(width * scale)))
            pixels = F.interpolate(pixels, inner, mode="bicubic", antialias=True)
        down, across = (self.size - side for side in pixels.shape[-2:])
        pixels = F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
        return self.normalize(pixels)
