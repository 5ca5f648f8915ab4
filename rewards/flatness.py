"""Cleanness of a Shapes image: a quality reward that ignores the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard
from diffalign.shapes.world import BACKGROUND, COLORS
from diffalign.types import RewardOutput


class FlatnessReward(Reward):
    """Closeness of an image's pixels to the colours of the Shapes world.

    The score is 1 minus the mean distance of a pixel to the nearest colour, divided by the longest distance between two
    colours. Rendered images score 0.99, because their outlines are smooth.
    """

    card = RewardCard(
        name="flatness",
        description="how near the pixels are to the pure colours of Shapes; does not look at the prompt",
        raw_range=(0.0, 1.0),
    )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        palette = torch.tensor([BACKGROUND, *COLORS.values()], dtype=torch.float32)
        longest = torch.cdist(palette, palette).max()
        pixels = images.cpu().permute(0, 2, 3, 1).flatten(1, 2).float()
        nearest = torch.stack([torch.cdist(image, palette).amin(1).mean() for image in pixels])
        return RewardOutput((1 - nearest / longest).numpy().astype(np.float32))
