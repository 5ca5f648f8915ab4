"""The exact verifier of Shapes as a reward: GenEval's continuous score, with the strict verdict in the details."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.shapes.verifier import verify
from diffalign.shapes.world import KINDS
from diffalign.types import RewardOutput


class VerifierReward(Reward):
    """Needs GenEval metadata (`include`) and an image of the Shapes world."""

    card = RewardCard(
        name="verifier",
        description="continuous GenEval score by the exact Shapes verifier; 1 is all right",
        raw_range=(-3.0, 1.0),
    )
    required_metadata = ("include",)

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        super().check_metadata(metadata)
        for row, entry in enumerate(metadata):
            for clause in [*entry["include"], *entry.get("exclude", ())]:
                if clause.get("class") not in KINDS or not isinstance(clause.get("count"), int):
                    raise RewardError(
                        f"reward 'verifier' cannot judge prompt {row + 1} ({entry.get('prompt', '')!r}): it knows "
                        f"{', '.join(KINDS)} with a whole count, the metadata asks for {dict(clause)}"
                    )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Mean of the score and of the official verdict, so that only an image that is wholly right earns 1."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        verdicts = [verify(p, m) for p, m in zip(pixels, metadata, strict=True)]
        score = np.array([v.score for v in verdicts], np.float32)
        correct = np.array([v.correct for v in verdicts], np.float32)
        strict = np.array([v.strict for v in verdicts], np.float32)
        return RewardOutput(
            values=(score + correct) / 2,
            details={"score": score, "correct": correct, "strict": strict},
        )
