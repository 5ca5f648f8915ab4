"""Human Preference Score v2 and v2.1 (Wu et al. 2023).

The model is CLIP ViT-H/14, trained on human choices; the raw score is the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward, ClipScorer
from diffalign.rewards.open_clip import build
from diffalign.rewards.preprocessing import LetterboxPreprocessing
from diffalign.rewards.weights import LAION_CLIP_H, REVISIONS, file_of, loading, revision_of

MODEL_ID = "xswu/HPSv2"
VISION_HEADS, TEXT_HEADS = 16, 16


class HPSv21Reward(ClipReward):
    """Human Preference Score v2.1.

    Published tables show 100 times this score. Scores of v2 and v2.1 are not comparable.
    """

    file: ClassVar[str] = "HPS_v2.1_compressed.pt"
    card = RewardCard(
        name="hpsv2.1",
        description="cosine of HPS v2.1, about 0.15 - 0.35",
        model_id=MODEL_ID,
        revision=REVISIONS[MODEL_ID],
        auxiliary={LAION_CLIP_H: REVISIONS[LAION_CLIP_H]},
        input_size=224,
        raw_range=(-1.0, 1.0),
        scale=5.0,
        offset=0.15,
        license="Apache-2.0",
    )

    def load(self) -> ClipScorer:
        with loading(f"{MODEL_ID}/{self.file}"):
            model = read(file_of(MODEL_ID, self.file))
            tokenizer = AutoTokenizer.from_pretrained(
                LAION_CLIP_H, revision=revision_of(LAION_CLIP_H)
            )
            return ClipScorer(model, tokenizer, LetterboxPreprocessing()).place()

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scorer.cosines(images, prompts)


class HPSv2Reward(HPSv21Reward):
    """Human Preference Score v2, the first release."""

    file = "HPS_v2_compressed.pt"
    card = replace(
        HPSv21Reward.card, name="hpsv2", description="cosine of HPS v2, about 0.2 - 0.35"
    )


def read(path: Path) -> CLIPModel:
    """Load the model of a released checkpoint, which holds open_clip's `state_dict`."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return build(state.get("state_dict", state), vision_heads=VISION_HEADS, text_heads=TEXT_HEADS)
