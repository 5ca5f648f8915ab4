"""Image quality by CLIP-IQA (Wang et al. 2023, arXiv 2207.12396).

The score compares an image with the texts of a good and of a bad photo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward
from diffalign.rewards.weights import CLIP_L, REVISIONS

ANCHORS = ("Good photo.", "Bad photo.")
LOGIT_SCALE = 100.0


class ClipIqaReward(ClipReward):
    """CLIP-IQA as in torchmetrics, with CLIP ViT-L/14, which `clip_score` uses, too.

    The paper's own network is a ResNet-50 without position embedding.
    """

    needs_prompt: ClassVar[bool] = False
    card = RewardCard(
        name="clip_iqa",
        description="softmax of 100 cosines of CLIP ViT-L/14 to good and bad photo; does not look at the prompt",
        model_id=CLIP_L,
        revision=REVISIONS[CLIP_L],
        input_size=224,
        license="MIT",
    )

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosines = self.scorer.image_features(images) @ self.scorer.text_features(ANCHORS).mT
        return (LOGIT_SCALE * cosines).softmax(-1)[:, 0]
