"""Agreement of a Shapes image with its caption, measured by `shapes-clip`.

The reward is learned and independent of the exact verifier.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward, ClipScorer
from diffalign.shapes import CHECKPOINTS

WEIGHTS_SHA256 = "87ef6a788795ee839c458fa71c2578ac65c1fdc9d8b577f8cfed072988cdcdbb"


class ShapesClipReward(ClipReward):
    """Cosine of shapes-clip, as a held-out reward of policies trained on the verifier.

    It can also be trained on.
    """

    card = RewardCard(
        name="shapes_clip",
        description="cosine of shapes-clip, a tiny CLIP trained on Shapes",
        model_id="shapes-clip",
        # the weights ship with this package
        revision=WEIGHTS_SHA256,
        input_size=64,
        raw_range=(-1.0, 1.0),
    )

    def load(self) -> ClipScorer:
        return ClipScorer.from_pretrained(str(CHECKPOINTS / "shapes-clip"))

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scorer.cosines(images, prompts)
