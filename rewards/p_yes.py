"""Probability that a vision-language model says yes to "does the image show this prompt?"."""

from __future__ import annotations

from diffalign.judges.base import NO, YES, Question, Reply
from diffalign.rewards.base import RewardCard
from diffalign.rewards.judged import JudgedReward, fill

QUESTION = 'Does this image show "{prompt}"?\nAnswer with yes or no.'
WIDEST = 0.2
"""Largest width of the bounds of an endpoint with which a reward has a value."""


class PYesReward(JudgedReward):
    """P(yes) / (P(yes) + P(no)) of the judge's first word.

    A reply that says neither, or whose bounds are too wide, is NaN.
    """

    card = RewardCard(
        name="p_yes",
        description="probability that a vision-language model says yes to the prompt",
        license="the judge's",
    )

    def question(self, prompt: str) -> Question:
        """Return a yes/no question that holds the prompt."""
        return Question("yes", fill(QUESTION, prompt), words=(YES, NO))

    def read(self, reply: Reply) -> float:
        """Return the share of yes in the middle of its bounds."""
        (yes_low, no_low), (yes_high, no_high) = reply.low, reply.high
        if yes_low + no_low <= 0:
            return float("nan")
        low = yes_low / (yes_low + no_high)
        high = yes_high / (yes_high + no_low)
        return (low + high) / 2 if high - low <= WIDEST else float("nan")
