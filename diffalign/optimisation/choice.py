"""Choice of a point that keeps the limits, by tests on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from diffalign.optimisation.limits import Limits
from diffalign.optimisation.search import Point, front

ATTEMPTS = 4
"""Number of points within a budget that are tested."""
SMALL = 0.01
"""Least scale of a reward's distance from its limit."""
Test = Callable[[Point], Point]
"""Function that draws images of held-out prompts, and returns the point with their comparisons."""


def keeps_budget(point: Point, limits: Limits) -> bool:
    """Return whether a point's latency and memory lie within the budget."""
    if limits.latency is not None and point.latency >= limits.latency:
        return False
    if limits.memory is None:
        return True
    return point.memory is not None and point.memory < limits.memory


def choose(
    points: Sequence[Point],
    limits: Limits,
    test: Test,
    *,
    ends: Callable[[], bool] = lambda: False,
) -> tuple[Point | None, list[Point]]:
    """Return the best accepted point, or None, and the tested points.

    Within a budget of latency it is the one nearest to the plain images. Without one it is the fastest. Points of one
    kind, such as those with a cache alone, are searched by halving: of two of them the slower one has the higher PSNR.
    Across kinds a PSNR says little about rewards.

    Args:
        points: measured points, the plain pipeline first.
        ends: is asked before each test but the first whether the time is up.
    """
    ready = [p for p in points[1:] if p.viable and keeps_budget(p, limits)]
    kinds: dict[object, list[Point]] = {}
    for point in ready:
        is_shorter = point.candidate.steps != points[0].candidate.steps
        kinds.setdefault((is_shorter, point.candidate.axes), []).append(point)
    memory = limits.memory is not None
    groups = [front(group, memory=memory) for group in kinds.values()]
    tested: list[Point] = []

    def accepts(point: Point) -> bool:
        tested.append(test(point))
        return tested[-1].accepted

    if limits.latency is not None:
        for point in _in_turn(groups)[:ATTEMPTS]:
            if tested and ends():
                break
            if accepts(point):
                return tested[-1], tested
        return None, tested
    best: Point | None = None
    for group in groups:
        faster = [p for p in group if best is None or p.ratio > best.ratio]
        low, high = 0, len(faster)
        while low < high and not (tested and ends()):
            middle = (low + high) // 2
            if accepts(faster[middle]):
                best, high = tested[-1], middle
            else:
                low = middle + 1
    return best, tested


def _in_turn(groups: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the points by PSNR: first the best of each group, then the second ones."""
    ranked = [sorted(group, key=lambda p: -p.psnr) for group in groups]
    longest = max(map(len, ranked), default=0)
    turns = [[g[turn] for g in ranked if turn < len(g)] for turn in range(longest)]
    return [p for turn in turns for p in sorted(turn, key=lambda p: -p.psnr)]


def nearest(points: Sequence[Point], tested: Sequence[Point], limits: Limits) -> Point:
    """Return the point that is nearest to the limits."""
    newest = {p.candidate: p for p in [*points, *tested] if p.problem is None}
    return min(newest.values(), key=lambda p: distance(p, limits))


def distance(point: Point, limits: Limits) -> float:
    """Return how far a point is from the limits: the sum of its relative excesses."""
    total = 0.0
    if limits.latency is not None:
        total += max(0.0, math.log(point.latency / limits.latency))
    if limits.memory is not None and point.memory is not None:
        total += max(0.0, math.log(point.memory / limits.memory))
    for verdict in (point.held_out or point.verdicts).values():
        # what is not shown to be kept counts by its interval
        value = verdict.estimate.low if point.held_out else verdict.estimate.value
        assert value is not None
        total += max(0.0, verdict.limit - value) / max(abs(verdict.limit), SMALL)
    return total
