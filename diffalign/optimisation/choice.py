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


def choose(points: Sequence[Point], limits: Limits, test: Test) -> tuple[Point | None, list[Point]]:
    """Return the best accepted point, or None, and the tested points.

    Within a budget of latency it is the one nearest to the plain images. Without one it is the fastest, which is
    searched by halving: of two points of the front the slower one has the higher PSNR.
    """
    memory = limits.memory is not None
    # the front of those within the budget, for a point outside of it may beat them all
    ready = front([p for p in points if p.viable and keeps_budget(p, limits)], memory=memory)
    ready = [p for p in ready if p.candidate != points[0].candidate]
    tested: list[Point] = []
    if limits.latency is not None:
        for point in sorted(ready, key=lambda p: -p.psnr)[:ATTEMPTS]:
            tested.append(test(point))
            if tested[-1].accepted:
                return tested[-1], tested
        return None, tested
    best: Point | None = None
    low, high = 0, len(ready)
    while low < high:
        # the slower half first: a refused point costs as much as an accepted one
        middle = (low + high) // 2
        point = test(ready[middle])
        tested.append(point)
        if point.accepted:
            best, high = point, middle
        else:
            low = middle + 1
    return best, tested


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
