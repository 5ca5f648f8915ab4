"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 trained on users' choices.

The score is logit scale x cosine, about 17 to 24.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward, ClipScorer
from diffalign.rewards.weights import LAION_CLIP_H, REVISIONS

MODEL_ID = "yuvalkirstain/PickScore_v1"


class PickScoreReward(ClipReward):
    """PickScore, normalised by 26 as in Flow-GRPO and AWM."""

    card = RewardCard(
        name="pickscore",
        description="logit scale times cosine of PickScore v1",
        model_id=MODEL_ID,
        revision=REVISIONS[MODEL_ID],
        auxiliary={LAION_CLIP_H: REVISIONS[LAION_CLIP_H]},
        input_size=224,
        raw_range=(0.0, 26.0),
        scale=1 / 26,
        license="MIT (code); the weights state none",
    )

    def load(self) -> ClipScorer:
        return ClipScorer.from_pretrained(MODEL_ID, processor_id=LAION_CLIP_H)

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores: Tensor = self.scorer.scale * self.scorer.cosines(images, prompts)
        return scores
