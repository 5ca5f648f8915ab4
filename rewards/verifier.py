"""Exact verifier of the Shapes world as a reward.

The score is GenEval's continuous one, with the strict verdict in the details.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.geneval.rules import Detection, Verdict
from diffalign.rewards.base import Metadata, RewardCard
from diffalign.rewards.detection import DetectionReward
from diffalign.shapes.verifier import detect
from diffalign.shapes.world import COLORS, KINDS


class VerifierReward(DetectionReward):
    """Verifier's score, for GenEval metadata (`include`) and images of the Shapes world."""

    card = RewardCard(
        name="verifier",
        description="continuous GenEval score by the exact Shapes verifier; 1 is all right",
        raw_range=(-3.0, 1.0),
    )
    classes = KINDS
    colors = tuple(COLORS)

    def detect(self, images: Tensor, metadata: Sequence[Metadata]) -> list[list[Detection]]:
        return [detect(pixels) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]

    def value(self, verdict: Verdict) -> float:
        """Return the mean of the continuous score and the official verdict.

        Only a completely correct image has 1.
        """
        return (verdict.score + verdict.correct) / 2
