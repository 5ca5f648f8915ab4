"""RationalRewards (TIGER-AI-Lab, arXiv 2604.11626): aspects of an image with reasons, 1 to 4.

The file `rational_rewards.txt` is the exact question that the weights were trained with (TIGER-AI-Lab/RationalRewards,
Apache-2.0).
"""

from __future__ import annotations

import re

import numpy as np

from diffalign.judges.base import Question, Reply
from diffalign.rewards.base import RewardCard
from diffalign.rewards.judged import JudgedReward, fill, template

MODEL_ID = "TIGER-Lab/RationalRewards-8B-T2I"
SYSTEM = (
    "You are an expert image generation evaluator. Your task is to evaluate the quality of a generated image based on "
    "a user instruction. Afterwards, you need to suggest how to refine the original user request to produce better "
    "image generation (if any)."
)
QUESTION = template("rational_rewards.txt")
HEADINGS = ("1. Text Faithfulness", "2. Physical and Visual Quality", "3. Text Rendering")
OPTIONAL = HEADINGS[2]
"""Aspect that is not applicable where the prompt asks for no text."""
LOWEST, HIGHEST = 1.0, 4.0
_SCORE = re.compile(r"Score\s*:\s*\**\s*(N/A|\d+(?:\.\d+)?)", re.IGNORECASE)


class RationalReward(JudgedReward):
    """Mean of faithfulness, quality and, where the prompt asks for text, its rendering."""

    default = MODEL_ID
    card = RewardCard(
        name="rational_rewards",
        description="mean of RationalRewards' aspects, 1 - 4",
        model_id=MODEL_ID,
        raw_range=(LOWEST, HIGHEST),
        offset=LOWEST,
        scale=1 / (HIGHEST - LOWEST),
        license="Apache-2.0 (code)",
    )

    def question(self, prompt: str) -> Question:
        """Return the question that the weights were trained with."""
        text = fill(QUESTION, prompt)
        return Question("score", text, kind="text", max_tokens=2048, system=SYSTEM)

    def read(self, reply: Reply) -> float:
        """Return the mean of the aspects; NaN if one that must be there is missing."""
        body = (reply.text or "").partition("# Summary:")[0]
        values = []
        for heading, next_heading in zip(HEADINGS, (*HEADINGS[1:], None), strict=True):
            section = body.partition(heading)[2]
            if next_heading:
                section = section.partition(next_heading)[0]
            match = _SCORE.search(section)
            absent = match is None or match[1].upper() == "N/A"
            if absent and heading != OPTIONAL:
                return float("nan")
            if match is not None and not absent:
                values.append(min(max(float(match[1]), LOWEST), HIGHEST))
        return float(np.mean(values))
