"""Image preprocessing of CLIP-like models on uint8 tensors: bit for bit what Pillow makes of the same pixels, in
batches and on any device, without a trip through Pillow.
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
"""Pillow's weights are integers in units of 2^-22."""
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
BAND = 32
"""Pixels of the result that are computed in one product: few enough that most of their row is not multiplied by 0."""
CHUNK = 16_000_000
"""Values that are resized at a time: eight bytes each, a few times over."""


def _kernel(x: float, resample: str, a: float = -0.5) -> float:
    x = abs(x)
    if resample == "bilinear":
        return max(0.0, 1 - x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@lru_cache(maxsize=64)
def _weights(before: int, after: int, start: int, count: int, resample: str) -> Tensor:
    """(count, before) float64 integers: Pillow's fixed-point weights of one axis from `before` to `after` pixels, for
    `count` of them from `start` (libImaging/Resample.c)."""
    scale = before / after
    stretch = max(scale, 1.0)
    support = SUPPORT[resample] * stretch
    table = torch.zeros(count, before, dtype=torch.float64)
    for row in range(count):
        center = (start + row + 0.5) * scale
        low = max(0, int(center - support + 0.5))
        high = min(before, int(center + support + 0.5))
        found = [_kernel((x - center + 0.5) / stretch, resample) for x in range(low, high)]
        total = sum(found)
        fixed = [v / total * (1 << PRECISION_BITS) for v in found]
        table[row, low:high] = torch.tensor([math.trunc(v + math.copysign(0.5, v)) for v in fixed])
    return table


@lru_cache(maxsize=64)
def _bands(
    before: int, after: int, start: int, count: int, resample: str, device: torch.device
) -> list[tuple[slice, Tensor]]:
    """The table of `_weights` in bands of BAND rows: the columns that are not zero, and (columns, rows) of them."""
    table = _weights(before, after, start, count, resample)
    bands = []
    for rows in table.split(BAND):
        used = rows.any(0).nonzero().flatten()
        columns = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((columns, rows[:, columns].T.contiguous().to(device)))
    return bands


def _along_width(images: Tensor, width: int, start: int, count: int, resample: str) -> Tensor:
    """(..., W) uint8 to `count` of `width` columns; sums of 255 x 2^22 x taps are exact in float64."""
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
    """(B, C, H, W) uint8 to (B, C, height, width) uint8, equal to `PIL.Image.resize` bit for bit ("bicubic" or
    "bilinear").

    Unless one side grows and the other shrinks: newer versions of Pillow then resize the height first. `crop` (top,
    left, height, width): only that part of the result is computed.
    """
    top, left, rows, columns = crop or (0, 0, height, width)
    found = []
    for part in images.split(max(1, CHUNK // images[0].numel())):
        across = _along_width(part, width, left, columns, resample).transpose(-1, -2)
        found.append(_along_width(across, height, top, rows, resample).transpose(-1, -2))
    return torch.cat(found)


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
        crop = ((height - self.size) // 2, (width - self.size) // 2, self.size, self.size)
        return resize(images, height, width, crop=crop)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, size, size) float32, normalised."""
        return self.normalize(self.pixels(images).float() / 255)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1."""
        mean, std = (
            torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (images - mean) / std


@dataclass(frozen=True)
class LetterboxPreprocessing(Preprocessing):
    """HPS's: the longest side to `size` by antialiased bicubic interpolation of floats, black to a square."""

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
