"""JPEG compressibility (DDPO, Black et al. 2023), a reward without weights.

It also shows that a reward can ask for something undesirable.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard
from diffalign.types import RewardOutput

QUALITY = 95


class JpegReward(Reward):
    """Negative size in kilobytes of an image as JPEG of quality 95."""

    card = RewardCard(
        name="jpeg",
        description="minus kilobytes as JPEG at quality 95; higher is smoother",
        raw_range=(-500.0, 0.0),
        scale=1 / 500,
        offset=0.0,
    )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        sizes = []
        for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
            sizes.append(-buffer.tell() / 1000)
        return RewardOutput(values=np.array(sizes, np.float32))
