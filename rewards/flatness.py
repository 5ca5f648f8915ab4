"""How clean a Shapes image is, whatever it shows: quality without a prompt, beside the verifier's obedience."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard
from diffalign.shapes.world import BACKGROUND, COLORS
from diffalign.types import RewardOutput


class FlatnessReward(Reward):
    """1 minus the mean distance of a pixel to the nearest of the world's colours, as a share of the longest distance
    between two of them; what the renderer draws has 0.99, for its outlines are smooth."""

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
