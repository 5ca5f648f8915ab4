"""The exact verifier of Shapes as a reward: GenEval's continuous score, with the strict verdict in the details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.shapes.prompts import RELATIONS
from diffalign.shapes.verifier import verify
from diffalign.shapes.world import COLORS, KINDS
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
            problem = _problem(entry)
            if problem:
                raise RewardError(
                    f"reward 'verifier' cannot judge prompt {row + 1} ({entry.get('prompt', '')!r}): {problem}"
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


def _problem(entry: Metadata) -> str | None:
    """What keeps the verifier from judging a prompt, or None."""
    include = entry["include"]
    if not isinstance(include, list) or not include:
        return "`include` must be a list of at least one object"
    for number, clause in enumerate([*include, *entry.get("exclude", ())]):
        if not isinstance(clause, Mapping) or clause.get("class") not in KINDS:
            return f"every object needs a class among {', '.join(KINDS)}, got {clause}"
        count = clause.get("count")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            return f"every object needs a count of at least 1, got {clause}"
        if clause.get("color", "red") not in COLORS:
            return f"colours are {', '.join(COLORS)}, got {clause['color']!r}"
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in RELATIONS or target not in range(number):
                return f"a position is one of {', '.join(RELATIONS)} and the index of an earlier object, got {clause}"
    return None
