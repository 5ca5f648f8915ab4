"""Align a denoiser's hidden states with semantic maps in pretraining.

The squared error of latents hardly depends on which of two blobs is the circle, so a small model learns objects long
before it learns relations. The renderer knows for every image token which kind and colour of object covers it. A small
head predicts this map from the hidden states of the middle block, and is thrown away afterwards. Representation
alignment in the manner of REPA (Yu et al. 2024, arXiv 2410.06940), with the renderer's truth as the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.pipelines.base import TextToImageModel
from diffalign.shapes.world import COLORS, IMAGE_SIZE, KINDS, Scene

NONE = 0
"""Label of a token that no object covers."""
MIN_COVER = 0.35
"""Share of a token's area that an object's box must cover to own the token."""
OBJECT_WEIGHT = 4.0
"""Weight of a token with an object; most tokens show the ground."""
HIDDEN = 256


def semantic_map(scene: Scene, *, side: int) -> np.ndarray:
    """Return the labels (2, side, side) of kind and colour, uint8. 0 is the ground.

    Later objects cover earlier ones, as in `render`.
    """
    edges = np.arange(side + 1) * (IMAGE_SIZE / side)
    labels = np.full((2, side, side), NONE, np.uint8)
    for item in scene:
        x1, y1, x2, y2 = item.box
        width = np.clip(np.minimum(edges[1:], x2) - np.maximum(edges[:-1], x1), 0, None)
        height = np.clip(np.minimum(edges[1:], y2) - np.maximum(edges[:-1], y1), 0, None)
        covered = height[:, None] * width[None, :] >= MIN_COVER * (IMAGE_SIZE / side) ** 2
        labels[0][covered] = 1 + KINDS.index(item.kind)
        labels[1][covered] = 1 + list(COLORS).index(item.color)
    return labels


class SemanticHead(nn.Sequential):
    """Head that names kind and colour of each image token: (B, N, D) to (B, N, kinds + colours + 2)."""

    def __init__(self, width: int) -> None:
        classes = len(KINDS) + 1 + len(COLORS) + 1
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, classes)
        )


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of kinds plus that of colours; object tokens weigh OBJECT_WEIGHT.

    Args:
        logits: (B, N, kinds + colours + 2), from `SemanticHead`.
        labels: (B, 2, N) integers, from `semantic_map`.
    """
    kinds, colors = logits.float().split([len(KINDS) + 1, len(COLORS) + 1], dim=-1)
    kind, color = labels.long().unbind(1)
    weight = torch.where(kind == NONE, 1.0, OBJECT_WEIGHT).flatten()
    errors = F.cross_entropy(kinds.flatten(0, 1), kind.flatten(), reduction="none")
    errors = errors + F.cross_entropy(colors.flatten(0, 1), color.flatten(), reduction="none")
    return (weight * errors).sum() / weight.sum()


def middle_block(denoiser: nn.Module) -> nn.Module:
    """Return the block whose hidden states are aligned: half way through, of a U-Net the middle."""
    if isinstance(middle := getattr(denoiser, "mid_block", None), nn.Module):
        return middle
    blocks: list[nn.Module] = [
        *getattr(denoiser, "transformer_blocks", ()),
        *getattr(denoiser, "single_transformer_blocks", ()),
    ]
    return blocks[(len(blocks) - 1) // 2]


def tokens_per_side(model: TextToImageModel, *, size: int = IMAGE_SIZE) -> int:
    """Return the number of the aligned block's image tokens per side.

    The image is a square of `size` pixels. The middle block of a U-Net sees its lowest resolution.
    """
    side = size // model.pixels_per_token
    halvings = len(getattr(model.denoiser, "down_blocks", [0])) - 1
    return int(side // 2**halvings)


def image_tokens(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the (B, N, D) hidden states of the image in what a block returns.

    Joint blocks return text and image in this order, a U-Net's middle block returns (B, D, H, W).
    """
    hidden = output if isinstance(output, Tensor) else output[-1]
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
