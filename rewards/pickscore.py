"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 trained on users' choices; logit scale x cosine, about 17 - 24."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward, ClipScorer
from diffalign.rewards.weights import LAION_CLIP_H


class PickScoreReward(ClipReward):
    """Normalised by 26, as Flow-GRPO and AWM do."""

    card = RewardCard(
        name="pickscore",
        description="logit scale times cosine of PickScore v1",
        model_id="yuvalkirstain/PickScore_v1",
        input_size=224,
        raw_range=(0.0, 26.0),
        scale=1 / 26,
        license="MIT (code); the weights state none",
    )

    def load(self) -> ClipScorer:
        assert self.card.model_id is not None
        return ClipScorer.from_pretrained(self.card.model_id, processor_id=LAION_CLIP_H)

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scorer.scale * self.scorer.cosines(images, prompts)
