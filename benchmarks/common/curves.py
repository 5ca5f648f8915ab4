"""Learning curves of runs, and the speedup of one run over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Held-out scores of one run with their cumulative cost.

    Attributes:
        score: scores of the evaluations (N,); the first is before training.
        cost: cost until each evaluation (N,) by unit (seconds, images, forwards). Evaluations cost nothing.
    """

    score: list[float]
    cost: dict[str, list[float]]

    def to_reach(self, target: float, unit: str) -> float | None:
        """Return the cost at which the score first reaches `target`.

        Return None if it never does. The score is interpolated linearly between evaluations.
        """
        cost = self.cost[unit]
        for i, score in enumerate(self.score):
            if score >= target:
                if i == 0:
                    return 0.0
                before = self.score[i - 1]
                share = (target - before) / (score - before)
                return cost[i - 1] + share * (cost[i] - cost[i - 1])
        return None


def read_curve(
    log: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    group: int,
    *,
    early: Sequence[dict[str, Any]] = (),
) -> Curve:
    """Read the learning curve from a run's log and summary.

    Args:
        log: rows of the log, one per update.
        summary: the run's summary.
        group: images per update.
        early: log of a shorter run with the same updates that is scored more often. Its evaluations before this run's
            first evaluation are added; their costs are this run's.
    """
    score = [summary["before"]["tasks"]["overall"]]
    cost: dict[str, list[float]] = {"seconds": [0.0], "images": [0.0], "forwards": [0.0]}
    forwards = list(accumulate(group * row["forwards_per_image"] for row in log))
    own = evaluations(log, summary["after"])
    more = [(i, row["evaluation"]) for i, row in enumerate(early) if "evaluation" in row]
    for i, evaluation in [e for e in more if e[0] < own[0][0]] + own:
        score.append(evaluation["tasks"]["overall"])
        spent = log[i]["seconds"], float(group * (i + 1)), forwards[i]
        for unit, value in zip(cost, spent, strict=True):
            cost[unit].append(value)
    return Curve(score, cost)


def evaluations(
    log: Sequence[dict[str, Any]], after: dict[str, Any]
) -> list[tuple[int, dict[str, Any]]]:
    """Return (row of the log, evaluation) of every evaluation in training.

    The last evaluation is `after`, which belongs to the last row.
    """
    rows = [(i, row["evaluation"]) for i, row in enumerate(log[:-1]) if "evaluation" in row]
    return [*rows, (len(log) - 1, after)]


def speedup(fast: Curve, slow: Curve, unit: str) -> float:
    """Return how many times less `fast` costs than `slow`.

    The costs are compared at the highest score that both reach. Return infinity if only `fast` improves, 0 if only
    `slow` does, and NaN if neither does.
    """
    gains = [max(c.score) > c.score[0] for c in (fast, slow)]
    if not all(gains):
        return {(True, False): math.inf, (False, True): 0.0}.get((gains[0], gains[1]), math.nan)
    target = min(max(fast.score), max(slow.score))
    fast_cost, slow_cost = fast.to_reach(target, unit), slow.to_reach(target, unit)
    # Both curves reach the smaller of their maxima.
    assert fast_cost is not None
    assert slow_cost is not None
    return slow_cost / fast_cost if fast_cost else math.inf


def finite(value: float | None, *, digits: int = 3) -> float | None:
    """Return the rounded value, or None if it is not finite: JSON has no infinity."""
    return round(value, digits) if value is not None and math.isfinite(value) else None
