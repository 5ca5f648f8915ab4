"""Checklists as pure functions: probabilities of answers, parents, zeroing and means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from diffalign.core.errors import UserError
from diffalign.judges.base import NO, YES, Question, Reply, probability

NONE, RAW, PROPAGATED, IN_FILE_ORDER = "none", "raw", "propagated", "in_file_order"
ONE_WORD = "Answer with yes or no."
Span = tuple[float, float]
"""Smallest and largest value that the replies allow."""


class ChecklistError(UserError, ValueError):
    """Checklist whose parents do not exist or lead back to themselves."""


def soft_tifa(probabilities: Sequence[Span]) -> tuple[Span, Span]:
    """Return the arithmetic and the geometric mean of answers' probabilities.

    Source: GenEval 2 (arXiv 2512.16853), Soft-TIFA. The geometric mean is 0 if one probability is 0.
    """
    n = len(probabilities)
    lows, highs = zip(*probabilities, strict=True)
    arithmetic = (sum(lows) / n, sum(highs) / n)
    return arithmetic, (math.prod(lows) ** (1 / n), math.prod(highs) ** (1 / n))


def check_parents(parents: Mapping[str, Sequence[str]], place: str) -> None:
    """Raise ChecklistError if a parent does not exist, or if parents form a circle."""
    for key, above in parents.items():
        lost = [p for p in above if p not in parents]
        if lost:
            raise ChecklistError(
                f"{place}: question {key} has the parent {lost[0]}, which does not exist. Correct the file"
            )
    dependency_order(parents, place)


def dependency_order(parents: Mapping[str, Sequence[str]], place: str = "checklist") -> list[str]:
    """Return the questions with every parent before its children.

    Raises:
        ChecklistError: parents form a circle.
    """
    order: list[str] = []
    placed: set[str] = set()
    waiting = list(parents)
    while waiting:
        ready = [key for key in waiting if placed.issuperset(parents[key])]
        if not ready:
            raise ChecklistError(
                f"{place}: the parents of question {waiting[0]} lead back to it. Correct the file"
            )
        order += ready
        placed |= set(ready)
        waiting = [key for key in waiting if key not in placed]
    return order


def checklist(
    answers: Mapping[str, Span], parents: Mapping[str, Sequence[str]], *, zeroing: str
) -> dict[str, Span]:
    """Return the answers after zeroing.

    A question whose parent is wrong counts as wrong.

    Args:
        answers: value of each question in 0..1.
        parents: parents of each question, in the file's order.
        zeroing: `none`; `raw`, where a parent's own answer counts (OneIG); `propagated`, where a zeroed parent counts
            as wrong, in the order of dependencies; `in_file_order`, the same in the file's order (DPG's release).
    """
    if zeroing == NONE:
        return dict(answers)
    values = dict(answers)
    order = dependency_order(parents) if zeroing == PROPAGATED else list(parents)
    for key in order:
        above = answers if zeroing == RAW else values
        # read now, so that a later parent is not zeroed yet in the file's order
        spans = [above[p] for p in parents[key]]
        low, high = values[key]
        if any(h == 0 for _, h in spans):
            values[key] = (0.0, 0.0)
        elif any(lo == 0 for lo, _ in spans):
            values[key] = (0.0, high)
        else:
            values[key] = (low, high)
    return values


def mean_span(values: Sequence[Span]) -> Span:
    """Return the mean of bounds."""
    lows, highs = zip(*values, strict=True)
    return sum(lows) / len(lows), sum(highs) / len(highs)


def yes_no(key: str, text: str) -> Question:
    """Return a question whose answer is yes or no."""
    return Question(key, f"{text}\n{ONE_WORD}", words=(YES, NO))


def answers_of(replies: Mapping[str, Reply], keys: Iterable[str]) -> dict[str, Span]:
    """Return the answers to questions of `yes_no`, by their keys.

    An answer is 1 where a yes is more probable than a no, else 0, as bounds.
    """
    answers = {}
    for key in keys:
        yes, no = (probability(replies.get(key), group) for group in range(2))
        answers[key] = (float(yes[0] > no[1]), float(yes[1] > no[0]))
    return answers
