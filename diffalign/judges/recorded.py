"""Judge that only repeats replies which are already in a folder: nothing is asked."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.judges.base import Judge, JudgeCard, Reply, Task


class RecordedJudge(Judge):
    """Judge of recorded replies, under the card of the judge that gave them.

    Args:
        card: card of the judge that gave the recorded replies.
    """

    def __init__(self, card: JudgeCard) -> None:
        self.card = card

    def answer(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return an error for every question.

        Recorded replies are found before a judge is asked.
        """
        return [Reply(error="no reply is recorded") for _ in tasks]
