"""Searches over factors: generators that yield candidates and are sent their values, so that a batch is drawn at once.

All maximise within a box. What is best is the caller's to remember; engines only say what to try next.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from diffalign.core.errors import UsageError
from diffalign.schedulers import Coefficients
from diffalign.schedulers.coefficients import LEAST, MOST

Engine = Generator[list[Coefficients], Sequence[float], None]


@dataclass(frozen=True)
class Space:
    """Where to search: N steps, each factor within `low`..`high`; `start` is tried first by engines that start
    somewhere."""

    steps: int
    low: float = 0.8
    high: float = 1.2
    start: Coefficients | None = None

    def __post_init__(self) -> None:
        if not (LEAST <= self.low <= 1 <= self.high <= MOST and self.low < self.high):
            raise UsageError(
                f"box: must hold 1 and something else, within {LEAST:g}..{MOST:g}; got "
                f"{self.low:g}..{self.high:g}"
            )

    @property
    def origin(self) -> Coefficients:
        """`start` where it is given, drawn into the box; otherwise the schedule as it is."""
        return self.clip(self.start) if self.start is not None else Coefficients.ones(self.steps)

    def clip(self, coefficients: Coefficients) -> Coefficients:
        """The nearest within the box."""
        return Coefficients.from_vector(np.clip(coefficients.vector, self.low, self.high).tolist())


def grid(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """The published search: all pairs of n x n first-step values, n^2 the largest square within the budget, each pair a
    ramp to 1 (`Coefficients.ramp`)."""
    del seed
    n = max(2, int(budget**0.5))
    values = np.linspace(space.low, space.high, n)
    candidates = [Coefficients.ramp(a, b, space.steps) for a in values for b in values]
    yield candidates


def coordinate(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """One factor after the other: a step up and a step down, then the top of the parabola through the three; the step
    halves after each round in which nothing is gained."""
    del seed
    here = space.origin
    value = (yield [here])[0]
    spent, width = 1, (space.high - space.low) / 8
    while spent < budget and width > 1e-3:
        gained = False
        for i in range(2 * space.steps):
            sides = [_moved(space, here, i, by) for by in (-width, width)]
            low, high = yield sides
            tried = list(zip((low, high), sides, strict=True))
            spent += 2
            top = _parabola(low, value, high, width)
            if top is not None:
                peak = _moved(space, here, i, top)
                tried.append(((yield [peak])[0], peak))
                spent += 1
            best, place = max(tried, key=lambda pair: pair[0])
            if best > value:
                here, value, gained = place, best, True
            if spent >= budget:
                return
        width = width if gained else width / 2


def _moved(space: Space, here: Coefficients, i: int, by: float) -> Coefficients:
    vector = here.vector
    vector[i] += by
    return space.clip(Coefficients.from_vector(vector))


def _parabola(low: float, middle: float, high: float, width: float) -> float | None:
    """Where a parabola through three equally spaced values has its top; None where it has none within the two sides."""
    bend = low - 2 * middle + high
    if not np.isfinite(bend) or bend >= 0:
        return None
    top = 0.5 * width * (low - high) / bend
    return top if 0.02 * width < abs(top) < width else None


def cma(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """CMA-ES on all 2 N factors, by the `cma` package. (Hansen 2016, arXiv 1604.00772)"""
    yield from _evolve(space, space.origin.vector, Coefficients.from_vector, budget, seed)


def ramp(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """CMA-ES on the two numbers of the published search, from the schedule as it is: no start is a ramp."""

    def made(numbers: Sequence[float]) -> Coefficients:
        sample, model_output = numbers
        return Coefficients.ramp(sample, model_output, space.steps)

    yield from _evolve(space, [1.0, 1.0], made, budget, seed)


def _evolve(
    space: Space,
    start: Sequence[float],
    made: Callable[[Sequence[float]], Coefficients],
    budget: int,
    seed: int,
) -> Engine:
    """CMA-ES in a box, the start first; `made` turns its numbers into a candidate."""
    try:
        import cma as package
    except ImportError as error:
        raise UsageError("engine: cma and ramp need the package cma: pip install cma") from error
    options = {
        "bounds": [space.low, space.high],
        "seed": seed + 1,  # 0 is the clock to this package
        "verbose": -9,
        "maxfevals": budget,
    }
    search = package.CMAEvolutionStrategy(list(start), (space.high - space.low) / 8, options)
    spent = 1
    yield [made(start)]
    while spent < budget:
        asked = search.ask()[: budget - spent]
        values = yield [made(x.tolist()) for x in asked]
        spent += len(asked)
        if len(asked) < search.popsize:
            return
        search.tell(asked, [-v if np.isfinite(v) else 1e9 for v in values])


def none(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """Nothing but the start: the closed form as it is."""
    del budget, seed
    yield [space.origin]


ENGINES: dict[str, Callable[..., Engine]] = {
    "cma": cma,
    "coordinate": coordinate,
    "grid": grid,
    "ramp": ramp,
    "none": none,
}
