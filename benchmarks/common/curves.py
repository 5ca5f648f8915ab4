"""Learning curves of runs, and how much sooner one reaches what another reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Curve:
    """One run. `score` (N,) of held-out evaluations, the first before training; `cost` maps each unit (seconds, images,
    forwards) to what had been spent by then (N,); evaluations cost nothing."""

    score: list[float]
    cost: dict[str, list[float]]

    def to_reach(self, target: float, unit: str) -> float | None:
        """Cost at which the score first reaches `target`, linear between evaluations; None where it never does."""
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
    """From a run's log and summary.

    Args:
        group: images of an update.
        early: log of a shorter run of the same updates, scored more often. Its evaluations before this run's first are
            taken for this run's, whose cost they have.
    """
    score = [summary["before"]["tasks"]["overall"]]
    cost: dict[str, list[float]] = {"seconds": [0.0], "images": [0.0], "forwards": [0.0]}
    forwards = list(accumulate(group * row["forwards_per_image"] for row in log))
    own = evaluations(log, summary["after"])
    more = [(i, row["evaluation"]) for i, row in enumerate(early) if "evaluation" in row]
    for i, found in [e for e in more if e[0] < own[0][0]] + own:
        score.append(found["tasks"]["overall"])
        spent = log[i]["seconds"], float(group * (i + 1)), forwards[i]
        for unit, value in zip(cost, spent, strict=True):
            cost[unit].append(value)
    return Curve(score, cost)


def evaluations(
    log: Sequence[dict[str, Any]], after: dict[str, Any]
) -> list[tuple[int, dict[str, Any]]]:
    """(row of the log, evaluation) of all that were made while training; `after` is that of the last row."""
    found = [(i, row["evaluation"]) for i, row in enumerate(log[:-1]) if "evaluation" in row]
    return [*found, (len(log) - 1, after)]


def speedup(fast: Curve, slow: Curve, unit: str) -> float:
    """Cost of `slow` over the cost of `fast` at the highest score that both reach.

    Infinite where only `fast` gains anything, 0 where only `slow` does, NaN where neither does.
    """
    gains = [max(c.score) > c.score[0] for c in (fast, slow)]
    if not all(gains):
        return {(True, False): math.inf, (False, True): 0.0}.get((gains[0], gains[1]), math.nan)
    target = min(max(fast.score), max(slow.score))
    ours, theirs = fast.to_reach(target, unit), slow.to_reach(target, unit)
    assert ours is not None  # both reach it
    assert theirs is not None
    return theirs / ours if ours else math.inf


def finite(value: float | None, *, digits: int = 3) -> float | None:
    """For JSON, which knows no infinity: None."""
    return round(value, digits) if value is not None and math.isfinite(value) else None
