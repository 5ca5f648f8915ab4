"""Search engines for factors, as generators that yield candidates and receive their values.

A batch of candidates is thus evaluated at once. All engines maximise within a box. The caller stores the best
candidate.
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
    """Search space of factors for N steps.

    Attributes:
        steps: number of steps N.
        low: least value of a factor.
        high: largest value of a factor.
        start: first candidate of engines that have a start; the original schedule if None.
    """

    steps: int
    low: float = 0.8
    high: float = 1.2
    start: Coefficients | None = None

    def __post_init__(self) -> None:
        if not (LEAST <= self.low <= 1 <= self.high <= MOST and self.low < self.high):
            raise UsageError(
                f"box={self.low:g},{self.high:g}: the bounds must differ, contain 1 and lie in {LEAST:g}..{MOST:g}. "
                "Choose for instance 0.8,1.2."
            )

    @property
    def origin(self) -> Coefficients:
        """Return `start` clipped to the box, or the original schedule without one."""
        return self.clip(self.start) if self.start is not None else Coefficients.ones(self.steps)

    def clip(self, coefficients: Coefficients) -> Coefficients:
        """Return the nearest coefficients within the box."""
        return Coefficients.from_vector(np.clip(coefficients.vector, self.low, self.high).tolist())


def grid(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """Try the published grid of n x n first-step values.

    The largest square n^2 within the budget is used; each pair is a ramp to 1 (`Coefficients.ramp`).
    """
    del seed
    n = max(2, int(budget**0.5))
    values = np.linspace(space.low, space.high, n)
    candidates = [Coefficients.ramp(a, b, space.steps) for a in values for b in values]
    yield candidates


def coordinate(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """Change one factor after the other.

    Each factor is tried one width up and down and at the top of the parabola through the three values. The width
    halves after a round without a gain.
    """
    del seed
    point = space.origin
    value = (yield [point])[0]
    spent, width = 1, (space.high - space.low) / 8
    while spent < budget and width > 1e-3:
        gained = False
        for i in range(2 * space.steps):
            sides = [_moved(space, point, i, by) for by in (-width, width)]
            low, high = yield sides
            tried = list(zip((low, high), sides, strict=True))
            spent += 2
            top = _parabola(low, value, high, width)
            if top is not None:
                peak = _moved(space, point, i, top)
                tried.append(((yield [peak])[0], peak))
                spent += 1
            best, candidate = max(tried, key=lambda pair: pair[0])
            if best > value:
                point, value, gained = candidate, best, True
            if spent >= budget:
                return
        width = width if gained else width / 2


def _moved(space: Space, point: Coefficients, i: int, by: float) -> Coefficients:
    vector = point.vector
    vector[i] += by
    return space.clip(Coefficients.from_vector(vector))


def _parabola(low: float, middle: float, high: float, width: float) -> float | None:
    """Return the offset of the top of a parabola through three equally spaced values.

    Return None if the top is not between the two sides.
    """
    bend = low - 2 * middle + high
    if not np.isfinite(bend) or bend >= 0:
        return None
    top = 0.5 * width * (low - high) / bend
    return top if 0.02 * width < abs(top) < width else None


def cma(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """Search all 2 N factors by CMA-ES from the `cma` package (Hansen 2016, arXiv 1604.00772)."""
    yield from _evolve(space, space.origin.vector, Coefficients.from_vector, budget, seed)


def ramp(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """Search the two numbers of the published ramp by CMA-ES, from the original schedule.

    A start is ignored, since it is no ramp.
    """

    def to_candidate(numbers: Sequence[float]) -> Coefficients:
        sample, model_output = numbers
        return Coefficients.ramp(sample, model_output, space.steps)

    yield from _evolve(space, [1.0, 1.0], to_candidate, budget, seed)


def _evolve(
    space: Space,
    start: Sequence[float],
    to_candidate: Callable[[Sequence[float]], Coefficients],
    budget: int,
    seed: int,
) -> Engine:
    """Run CMA-ES in a box from `start`; `to_candidate` turns its numbers into a candidate."""
    try:
        import cma as package
    except ImportError as error:
        raise UsageError(
            "engine: cma and ramp need the package cma. Install it with: pip install cma"
        ) from error
    options = {
        "bounds": [space.low, space.high],
        # For this package seed 0 means the clock.
        "seed": seed + 1,
        "verbose": -9,
        "maxfevals": budget,
    }
    search = package.CMAEvolutionStrategy(list(start), (space.high - space.low) / 8, options)
    spent = 1
    yield [to_candidate(start)]
    while spent < budget:
        population = search.ask()[: budget - spent]
        values = yield [to_candidate(x.tolist()) for x in population]
        spent += len(population)
        if len(population) < search.popsize:
            return
        search.tell(population, [-v if np.isfinite(v) else 1e9 for v in values])


def none(space: Space, *, budget: int, seed: int = 0) -> Engine:
    """Try only the start, which is the closed form."""
    del budget, seed
    yield [space.origin]


ENGINES: dict[str, Callable[..., Engine]] = {
    "cma": cma,
    "coordinate": coordinate,
    "grid": grid,
    "ramp": ramp,
    "none": none,
}
