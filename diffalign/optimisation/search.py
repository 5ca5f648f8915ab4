"""Search over combinations of options, which depends on the measurements alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffalign.evaluation.pictures import evenly
from diffalign.optimisation.acceptance import Verdict
from diffalign.optimisation.candidates import Candidate, Level

GAIN = 1.03
"""Least ratio of times, or of memory, that counts as a gain."""
BEAM = 2
"""Number of combinations that are extended at a time."""
WIDTH = 6
"""Number of extensions that are measured in a round, spread over their expected times."""


@dataclass(frozen=True)
class Point:
    """Measured candidate.

    Attributes:
        ratio: how many times faster than the plain pipeline a call is.
        latency: seconds of one call.
        memory: peak bytes of one call, or None.
        psnr: mean PSNR in dB to the plain images of the search.
        verdicts: comparisons with the limits on the images of the search.
        problem: reason why it cannot be in force; the figures are then 0.
        held_out: comparisons on held-out prompts; empty for a point that was not tested.
    """

    candidate: Candidate
    ratio: float = 0.0
    latency: float = 0.0
    memory: int | None = None
    psnr: float = 0.0
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    problem: str | None = None
    held_out: dict[str, Verdict] = field(default_factory=dict)

    @property
    def viable(self) -> bool:
        """True unless it is broken or shown to lose too much."""
        return self.problem is None and not any(v.refuted for v in self.verdicts.values())

    @property
    def accepted(self) -> bool:
        """True if the held-out images show that all limits of the quality are kept."""
        return bool(self.held_out) and all(v.accepted for v in self.held_out.values())

    def to_dict(self, plain_steps: int) -> dict[str, Any]:
        """Return the point as JSON values."""
        record = {
            "name": self.candidate.text(plain_steps),
            "candidate": self.candidate.key,
            "ratio": self.ratio,
            "latency_seconds": self.latency,
            "memory_bytes": self.memory,
            "psnr": self.psnr,
            "search": {n: v.to_dict() for n, v in self.verdicts.items()},
            "held_out": {n: v.to_dict() for n, v in self.held_out.items()},
        }
        if self.problem is None:
            return record
        return {k: record[k] for k in ("name", "candidate")} | {"problem": self.problem}


def search(
    plain: Point,
    levels: Sequence[Level],
    measure: Callable[[Candidate], Point],
    *,
    ends: Callable[[], bool],
    counts_memory: bool = False,
) -> list[Point]:
    """Return the measured points, the plain pipeline first.

    Each level is measured alone. Those that gain something and are viable are then combined: the fastest combinations
    are extended by one level at a time, until no extension gains.

    Args:
        plain: the plain pipeline.
        levels: levels to try.
        measure: measures a candidate; a broken or excluded one has a problem.
        ends: is asked before each measurement whether the time is up.
        counts_memory: whether a saving of memory is a gain.
    """
    steps = plain.candidate.steps
    points = {plain.candidate: plain}

    def measured(candidates: Sequence[Candidate]) -> Iterator[Point]:
        for candidate in candidates:
            if candidate not in points:
                if ends():
                    return
                points[candidate] = measure(candidate)
            yield points[candidate]

    alone = {
        level: point
        for level in levels
        if (candidate := level.on(plain.candidate, plain_steps=steps)) is not None
        for point in measured([candidate])
    }
    useful = {
        level: point
        for level, point in alone.items()
        if point.viable and gains(point, plain, memory=counts_memory)
    }
    beams = fastest(useful.values(), BEAM)
    while beams and not ends():
        expected: dict[Candidate, float] = {}
        for beam in beams:
            for level, point in useful.items():
                longer = level.on(beam.candidate, plain_steps=steps)
                if longer is not None and longer not in points:
                    expected[longer] = max(expected.get(longer, 0.0), beam.ratio * point.ratio)
        # ties keep the order of the levels; the milder half is measured, too, for it may be all that is accepted
        tried = evenly(sorted(expected, key=lambda c: -expected[c]), WIDTH)
        least = min(beam.ratio for beam in beams)
        better = [p for p in measured(tried) if p.viable and p.ratio > least * GAIN]
        beams = fastest(better, BEAM)
    return list(points.values())


def gains(point: Point, plain: Point, *, memory: bool) -> bool:
    """Return whether a point is faster than the plain pipeline, or smaller where that counts."""
    if point.ratio >= GAIN:
        return True
    return (
        memory
        and point.memory is not None
        and plain.memory is not None
        and plain.memory >= GAIN * point.memory
    )


def fastest(points: Sequence[Point] | Any, n: int) -> list[Point]:
    """Return the n fastest points; of equally fast ones the first."""
    return sorted(points, key=lambda p: -p.ratio)[:n]


def front(points: Sequence[Point], *, memory: bool = False) -> list[Point]:
    """Return the points that no other beats in time and PSNR, the fastest first.

    Args:
        memory: whether a point with less memory belongs to the front, too.
    """
    sound = [p for p in points if p.problem is None]

    def beats(a: Point, b: Point) -> bool:
        pairs = [(-a.latency, -b.latency), (a.psnr, b.psnr)]
        if memory and a.memory is not None and b.memory is not None:
            pairs.append((-a.memory, -b.memory))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    best = [p for p in sound if not any(beats(other, p) for other in sound)]
    return sorted(best, key=lambda p: p.latency)
