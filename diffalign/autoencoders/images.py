"""Images that an autoencoder is trained and measured on."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from diffalign.core.errors import UsageError
from diffalign.core.seeds import GEOMETRY, stream
from diffalign.data.folders import walk_images
from diffalign.data.images import fit, read_image
from diffalign.latents.codec import LatentCodec
from diffalign.shapes.autoencoder import random_images

RENDERED = "shapes"
HELD_OUT = 64
"""Largest number of held-out images, which measure the autoencoder and never train it."""


class ImageFiles:
    """Random crops of a folder's readable images, half of them mirrored.

    Every twentieth image is held out, up to `HELD_OUT` of them.

    Raises:
        UsageError: there is no such folder, or too few images that can be read.
    """

    def __init__(self, folder: str, resolution: int, *, seed: int) -> None:
        if not Path(folder).is_dir():
            raise UsageError(f"images: {folder} is no folder")
        listing = walk_images(Path(folder), error=UsageError)
        readable = [p for p in listing.images if _readable(p)]
        listing.leave_out(set(listing.images) - set(readable), "unreadable")
        listing.report()
        if len(readable) < 2:
            raise UsageError(
                f"images: {folder} holds {len(readable)} readable images; at least 2 are needed"
            )
        self.held_out = readable[::20][:HELD_OUT]
        self.training = [p for p in readable if p not in set(self.held_out)]
        self.resolution, self.seed = resolution, seed

    def __call__(self, update: int, count: int) -> Tensor:
        """Return the `count` training images of one update, (count, 3, H, W) uint8."""
        rng = np.random.default_rng(stream(GEOMETRY, self.seed, update))
        rows = rng.integers(len(self.training), size=count)
        return torch.stack([self._crop(self.training[r], rng) for r in rows])

    def measured(self) -> Tensor:
        """Return centre crops of the held-out images, (N, 3, H, W) uint8."""
        size = self.resolution, self.resolution
        return torch.stack([fit(_read(p), *size)[0] for p in self.held_out])

    def _crop(self, path: Path, rng: np.random.Generator) -> Tensor:
        top, left = rng.uniform(size=2)
        crop, _ = fit(_read(path), self.resolution, self.resolution, place=(top, left))
        return crop.flip(-1) if rng.uniform() < 0.5 else crop


class RenderedImages:
    """Rendered scenes of the Shapes world, 64 pixels a side."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def __call__(self, update: int, count: int) -> Tensor:
        """Return the `count` training images of one update, (count, 3, 64, 64) uint8."""
        rng = np.random.default_rng((self.seed, update))
        return torch.from_numpy(random_images(rng, count)).permute(0, 3, 1, 2)

    def measured(self) -> Tensor:
        """Return held-out scenes, rendered with the number of an update that no run reaches."""
        return self(10**9, HELD_OUT)


@torch.no_grad()
def quality(vae: Any, images: Tensor) -> dict[str, float]:
    """Return the mean PSNR (dB) and SSIM of the autoencoder's reconstructions.

    Args:
        vae: an AutoencoderKL or AutoencoderDC.
        images: (N, 3, H, W) uint8.
    """
    codec = LatentCodec(vae.eval())
    parts = [codec.decode(codec.encode(part)).cpu() for part in images.split(8)]
    decoded, target = torch.cat(parts).float(), images.float()
    per_image = (1, 2, 3)
    psnr = peak_signal_noise_ratio(
        decoded, target, data_range=255.0, dim=per_image, reduction="none"
    )
    ssim = structural_similarity_index_measure(decoded, target, data_range=255.0)
    # torchmetrics returns a pair only with `return_full_image=True`
    assert isinstance(ssim, Tensor)
    return {"psnr": round(float(psnr.mean()), 3), "ssim": round(float(ssim), 4)}


@lru_cache(maxsize=256)
def _read(path: Path) -> Tensor:
    return read_image(path)


def _readable(path: Path) -> bool:
    try:
        _read(path)
    except OSError:
        return False
    return True
