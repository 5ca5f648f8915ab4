"""CLIPScore (Hessel et al. 2021) on the scale of torchmetrics.

The score is 100 max(cos, 0) with CLIP ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward
from diffalign.rewards.weights import CLIP_L, REVISIONS


class ClipScoreReward(ClipReward):
    """Agreement of an image with its prompt.

    The paper's own scale is 2.5 max(cos, 0) with ViT-B/32.
    """

    card = RewardCard(
        name="clip_score",
        description="100 max(cosine, 0) of CLIP ViT-L/14",
        model_id=CLIP_L,
        revision=REVISIONS[CLIP_L],
        input_size=224,
        raw_range=(0.0, 100.0),
        scale=1 / 100,
        license="MIT",
    )

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * self.scorer.cosines(images, prompts).clamp_min(0)
