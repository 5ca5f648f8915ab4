"""Agreement of a Shapes image and its caption by `shapes-clip`: a learned reward, independent of the exact verifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward, ClipScorer
from diffalign.shapes import CHECKPOINTS

WEIGHTS_SHA256 = "87ef6a788795ee839c458fa71c2578ac65c1fdc9d8b577f8cfed072988cdcdbb"


class ShapesClipReward(ClipReward):
    """The cosine: for looking at what a policy trained on the verifier does under other eyes, or for training on."""

    card = RewardCard(
        name="shapes_clip",
        description="cosine of shapes-clip, a tiny CLIP trained on Shapes",
        model_id="shapes-clip",
        revision=WEIGHTS_SHA256,  # it is in this package
        input_size=64,
        raw_range=(-1.0, 1.0),
    )

    def load(self) -> ClipScorer:
        return ClipScorer.from_pretrained(str(CHECKPOINTS / "shapes-clip"))

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scorer.cosines(images, prompts)
