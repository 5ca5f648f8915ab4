"""UnifiedReward 2.0 (Wang et al. 2025, arXiv 2503.05236): scores of an image, and preferences between two.

The files `unified_reward.txt` and `unified_reward_pair.txt` are the exact questions that the weights were trained with
(CodeGoat24/UnifiedReward, MIT, Copyright (c) 2025 Yibin Wang).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from diffalign.judges.base import Question, Reply
from diffalign.rewards.base import Metadata, RewardCard
from diffalign.rewards.groups import PairwiseReward
from diffalign.rewards.judged import Asking, JudgedReward, fill, pictures, template

MODEL_ID = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
ASPECTS = ("Alignment", "Coherence", "Style")
LOWEST, HIGHEST = 1.0, 5.0
QUESTION, PAIR = template("unified_reward.txt"), template("unified_reward_pair.txt")


class UnifiedReward(JudgedReward):
    """Mean of alignment, coherence and style, each 1 to 5."""

    default = MODEL_ID
    card = RewardCard(
        name="unified_reward",
        description="mean of UnifiedReward 2.0's alignment, coherence and style, 1 - 5",
        model_id=MODEL_ID,
        raw_range=(LOWEST, HIGHEST),
        offset=LOWEST,
        scale=1 / (HIGHEST - LOWEST),
        license="MIT",
    )

    def question(self, prompt: str) -> Question:
        """Return the question that the weights were trained with."""
        return Question("score", fill(QUESTION, prompt), kind="text", max_tokens=256)

    def read(self, reply: Reply) -> float:
        """Return the mean of the three scores; NaN if one is missing."""
        values = [_score(reply.text or "", name) for name in ASPECTS]
        return float(np.mean(values))


def _score(text: str, aspect: str) -> float:
    lines = re.findall(rf"^{aspect} Score \(1-5\):\s*(-?\d+(?:\.\d+)?)\s*$", text, re.MULTILINE)
    value = float(lines[-1]) if lines else float("nan")
    return value if LOWEST <= value <= HIGHEST else float("nan")


class UnifiedPairReward(Asking, PairwiseReward):
    """Preference between two images of a prompt, asked in both orders.

    The judge splits 1 between two images for alignment, coherence and style. The preference is the mean of the three.
    """

    default = MODEL_ID
    both_orders = True
    card = RewardCard(
        name="unified_reward_pair",
        description="mean preference of UnifiedReward 2.0 over a prompt's other images, in both orders",
        model_id=MODEL_ID,
        license="MIT",
    )

    def prefer(
        self, first: Tensor, second: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> np.ndarray:
        """Return the preferences for the first of two images (P,), NaN without a valid reply."""
        self.prepare()
        rows = zip(prompts, pictures(first), pictures(second), strict=True)
        tasks = [
            (Question("pair", fill(PAIR, p), kind="text", max_tokens=256), (a, b))
            for p, a, b in rows
        ]
        return np.array([read_pair(reply) for reply in self.replies(tasks)])


def read_pair(reply: Reply) -> float:
    """Return the preference for the first image; NaN for another form of reply."""
    if reply.error is not None:
        return float("nan")
    number = r"(\d+(?:\.\d+)?)"
    shares = []
    for aspect in ASPECTS:
        pattern = rf"{aspect} Score:\s*Image 1:\s*{number}\s*Image 2:\s*{number}"
        match = re.search(pattern, reply.text or "")
        if match is None or float(match[1]) + float(match[2]) <= 0:
            return float("nan")
        shares.append(float(match[1]) / (float(match[1]) + float(match[2])))
    return float(np.mean(shares))
