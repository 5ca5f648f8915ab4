"""Likeness of images to others of the same prompts and noise, image by image."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> float:
    """Return the mean PSNR in dB of images (N, 3, H, W) uint8. Equal images give 78."""
    error = (images.float() - reference.float()).square().flatten(1).mean(1).clamp_min(1e-3)
    return float((10 * torch.log10(255**2 / error)).mean())
