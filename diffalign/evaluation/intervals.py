"""95 % intervals of means, shares, paired differences and win rates.

A prompt, not an image, is the unit of evidence: images of one prompt resemble each other. All standard errors are
clustered by prompt. Intervals speak of prompts like these, drawn with the same settings. Where there is one prompt
alone, its images are the units, and the interval speaks of that prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

CONFIDENCE = 0.95
FEWEST_PROMPTS = 6
"""Fewest prompts that can show a difference: with five, a two-sided sign test never falls below p = 0.06."""
RESAMPLES = 10_000
NOTE = (
    "Intervals are 95 % intervals clustered by prompt. A difference whose interval holds 0 is within noise. "
    f"Fewer than {FEWEST_PROMPTS} prompts (or images, of a single prompt) show no difference and have no interval."
)


def units(n: int, prompts: int) -> int:
    """Return the pieces of independent evidence in n images of so many prompts."""
    return prompts if prompts > 1 else n


def too_few(n: int, prompts: int) -> str:
    """Return that n images of so many prompts show no difference; empty where they can."""
    if units(n, prompts) >= FEWEST_PROMPTS:
        return ""
    # images of a single prompt are counted instead
    what, count = ("images", n) if prompts == 1 and n > 1 else ("prompts", prompts)
    return f"too few {what} ({count})"


def verdict(
    low: float | None, high: float | None, *, n: int, prompts: int, centre: float = 0.0
) -> str:
    """Return "up", "down" or "noise": where an interval lies beside `centre`."""
    if too_few(n, prompts) or low is None or high is None or low <= centre <= high:
        return "noise"
    return "up" if low > centre else "down"


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` images of so many `prompts`, with its interval.

    The bounds are None where one image shows no spread.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    prompts: int

    @property
    def units(self) -> int:
        """Pieces of independent evidence: prompts, or the images of a single prompt."""
        return units(self.n, self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Difference(Estimate):
    """Mean difference of `n` pairs of images of the same prompt and seed."""

    @property
    def within_noise(self) -> bool:
        """True where the pairs do not show in which direction the mean has moved."""
        word = verdict(self.low, self.high, n=self.n, prompts=self.prompts)
        return word == "noise"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, and whether the difference is within noise."""
        return {**vars(self), "within_noise": self.within_noise}


@dataclass(frozen=True)
class _Spread:
    """Centre, variance and degrees of freedom of a mean of clusters.

    The mean cannot be larger than `limit`: 1 for shares and their differences.
    """

    centre: float
    variance: float
    freedom: float
    limit: float = math.inf

    def bounds(self) -> tuple[float, float] | tuple[None, None]:
        if self.freedom <= 0:
            return None, None
        half = float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(self.variance)
        return self.centre - half, self.centre + half


def mean(values: np.ndarray, prompts: Sequence[str]) -> Estimate | None:
    """Return the mean of values (N,) without NaN, with its interval.

    Return None where all values are NaN.

    Values that are all 0 or 1 are shares: their interval is Wilson's (1927), for as many independent images as carry
    the same information (design effect of the clusters). Other means have Student's t on the clustered standard error.

    Args:
        prompts: the prompt of each value (N,).
    """
    x, group = _finite(values, prompts)
    if len(x) == 0:
        return None
    total, count = np.bincount(group, weights=x), np.bincount(group)
    value = float(x.mean())
    spread = _spread(total, count)
    different = _different(values, prompts)
    if _are_shares(x):
        shares = wilson(value, _independent(value, spread, n=len(x), groups=len(count)))
        return Estimate(value, *shares, n=len(x), prompts=different)
    low, high = spread.bounds()
    return Estimate(value, low, high, len(x), different)


def difference(after: np.ndarray, before: np.ndarray, prompts: Sequence[str]) -> Difference | None:
    """Return the mean of `after` (N,) less `before` (N,), pair by pair.

    Return None where no pair has both values.

    Student's t on the standard error clustered by prompt. Differences of shares get Agresti and Min's (2005) four half
    pairs besides, without which a few pairs that agree would look certain.
    """
    pair = _spread_difference(after, before, prompts)
    return None if pair is None else pair[0]


def _spread_difference(
    after: np.ndarray, before: np.ndarray, prompts: Sequence[str]
) -> tuple[Difference, _Spread] | None:
    """Return a paired difference and its spread, or None where no pair has both values."""
    x, _ = _finite(after - before, prompts)
    if len(x) == 0:
        return None
    spread = _difference_spread(after, before, prompts)
    different = _different(after - before, prompts)
    return _around(float(x.mean()), spread, n=len(x), prompts=different), spread


def task_mean(
    values: np.ndarray, prompts: Sequence[str], tasks: Sequence[str]
) -> dict[str, Estimate]:
    """Return the estimate of each task, and of GenEval's `overall`.

    That is the plain mean of the tasks.
    The interval of `overall` recovers the tasks' variances from their intervals (Zou and Donner 2008).
    """
    estimates: dict[str, Estimate] = {}
    for task, rows in _by_task(tasks).items():
        estimate = mean(values[rows], [prompts[i] for i in rows])
        if estimate is not None:
            estimates[task] = estimate
    if not estimates:
        return {}
    parts = list(estimates.values())
    value = sum(e.value for e in parts) / len(parts)
    low: float | None = None
    high: float | None = None
    if all(e.low is not None and e.high is not None for e in parts):
        low = value - math.hypot(*(e.value - e.low for e in parts if e.low is not None)) / len(
            parts
        )
        high = value + math.hypot(*(e.high - e.value for e in parts if e.high is not None)) / len(
            parts
        )
    n, total = sum(e.n for e in parts), sum(e.prompts for e in parts)
    return {**estimates, "overall": Estimate(value, low, high, n, total)}


def task_difference(
    after: np.ndarray, before: np.ndarray, prompts: Sequence[str], tasks: Sequence[str]
) -> dict[str, Difference]:
    """Return the paired difference of each task, and of their mean, `overall`.

    The tasks' variances are summed, with Satterthwaite's degrees of freedom.
    """
    differences: dict[str, Difference] = {}
    spreads: list[_Spread] = []
    for task, rows in _by_task(tasks).items():
        pair = _spread_difference(after[rows], before[rows], [prompts[i] for i in rows])
        if pair is not None:
            differences[task] = pair[0]
            spreads.append(pair[1])
    if not differences:
        return {}
    parts = list(differences.values())
    size = len(parts)
    variance = sum(s.variance for s in spreads)
    squares = sum(s.variance**2 / s.freedom for s in spreads if s.freedom > 0)
    unknown = any(s.freedom <= 0 for s in spreads)
    freedom = 0.0 if unknown else variance**2 / squares if squares else math.inf
    limit = max(s.limit for s in spreads)
    spread = _Spread(sum(s.centre for s in spreads) / size, variance / size**2, freedom, limit)
    n, total = sum(e.n for e in parts), sum(e.prompts for e in parts)
    value = sum(e.value for e in parts) / size
    return {**differences, "overall": _around(value, spread, n=n, prompts=total)}


def wilson(share: float, n: float, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share of n independent trials.

    The number n need not be whole.
    """
    z = float(ndtri((1 + confidence) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def bootstrap(
    values: np.ndarray, prompts: Sequence[str], *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the mean of values (N,), by a bootstrap over their prompts."""
    group = _groups(prompts)
    total, count = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    even = np.full(len(count), 1 / len(count))
    means = np.empty(RESAMPLES)
    # one at a time: with many prompts a table of all would not fit
    for i in range(RESAMPLES):
        resample = rng.multinomial(len(count), even)
        means[i] = (resample @ total) / (resample @ count)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _groups(prompts: Sequence[str]) -> np.ndarray:
    """Return the number of each value's prompt (N,). Images of a single prompt are counted instead."""
    group = np.unique(np.array(prompts, dtype=object).astype(str), return_inverse=True)[1]
    return group if group.any() else np.arange(len(group))


def _different(values: np.ndarray, prompts: Sequence[str]) -> int:
    """Return the number of different prompts that have a value."""
    return len({prompts[int(i)] for i in np.flatnonzero(np.isfinite(values))})


def _finite(values: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that are numbers, in float64, and their prompts' numbers."""
    values = np.asarray(values, np.float64)
    rows = np.flatnonzero(np.isfinite(values))
    if len(rows) == 0:
        return values[rows], rows
    return values[rows], _groups([prompts[int(i)] for i in rows])


def _are_shares(*columns: np.ndarray) -> bool:
    return all(bool(np.isin(x[np.isfinite(x)], (0.0, 1.0)).all()) for x in columns)


def _spread(total: np.ndarray, count: np.ndarray) -> _Spread:
    """Return the spread of sum(total) / sum(count) over clusters (linearised, G / (G - 1))."""
    groups, n = len(count), float(count.sum())
    centre = float(total.sum()) / n
    if groups < 2:
        return _Spread(centre, 0.0, 0.0)
    residuals = total - centre * count
    variance = groups / (groups - 1) * float(residuals @ residuals) / n**2
    return _Spread(centre, variance, groups - 1)


def _difference_spread(after: np.ndarray, before: np.ndarray, prompts: Sequence[str]) -> _Spread:
    """Return the spread of a paired difference. Shares get Agresti and Min's half pairs, as two clusters."""
    x, group = _finite(after - before, prompts)
    total, count = np.bincount(group, weights=x), np.bincount(group).astype(np.float64)
    valid = np.isfinite(after - before)
    if _are_shares(after[valid], before[valid]):
        size = _correlated(x, _spread(total, count), largest=float(count.mean()))
        # two half pairs of +1 and -1 have together the squares of these two
        total = np.append(total, [size * math.sqrt(0.5), -size * math.sqrt(0.5)])
        count = np.append(count, [size, size])
        return replace(_spread(total, count), limit=1.0)
    return _spread(total, count)


def _correlated(x: np.ndarray, spread: _Spread, *, largest: float) -> float:
    """Return how many images of one prompt count as one: the design effect, from 1 to `largest`."""
    plain = float(x.var()) / len(x)
    return min(max(spread.variance / plain, 1.0), largest) if plain > 0 else largest


def _around(value: float, spread: _Spread, *, n: int, prompts: int) -> Difference:
    """Return a difference with the bounds of its spread, which hold its value."""
    low, high = spread.bounds()
    if low is None or high is None:
        return Difference(value, None, None, n, prompts)
    low, high = (min(max(v, -spread.limit), spread.limit) for v in (low, high))
    return Difference(value, min(low, value), max(high, value), n, prompts)


def _independent(share: float, spread: _Spread, *, n: int, groups: int) -> float:
    """Return how many independent images say as much as n images of `groups` prompts."""
    if groups == n:
        return n
    if share in (0.0, 1.0):
        # images of a prompt that all agree may be one and the same answer
        return groups
    ratio = float(ndtri((1 + CONFIDENCE) / 2)) / float(
        stdtrit(spread.freedom, (1 + CONFIDENCE) / 2)
    )
    size = share * (1 - share) / spread.variance if spread.variance > 0 else n
    return max(min(size, n) * ratio**2, 0.5)


def _by_task(tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the rows of each task."""
    rows: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        rows.setdefault(task, []).append(i)
    return {task: np.array(numbers) for task, numbers in rows.items()}
