"""Figures of a benchmark with their intervals: pure functions of what was measured on each prompt.

All figures are weighted means, or sums of such. A bootstrap over prompts gives every interval. Replies that are unknown
become bounds of a figure: as if they were all wrong, and as if they were all right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign.evaluation.intervals import CONFIDENCE, RESAMPLES, verdict, wilson
from diffalign.evaluation.preference import win_rate
from diffalign.evaluation.suite.base import Measure, Weights

KNOWN = 0.05
"""Largest width of bounds at which a value counts as known."""
LEAST_ANSWERED = 0.98
"""Least share of known values with which a headline is printed."""
REWARD = "reward/"
CHUNK = 500


@dataclass(frozen=True)
class Row:
    """Measures of one prompt.

    Attributes:
        prompt: text of the prompt.
        measures: what its images are worth.
    """

    prompt: str
    measures: Sequence[Measure]


@dataclass(frozen=True)
class _Table:
    """Sums of values and weights (P, N) of N figures on P prompts."""

    names: list[str]
    total: np.ndarray
    weight: np.ndarray
    low: np.ndarray
    high: np.ndarray
    full_weight: np.ndarray
    counts: np.ndarray
    certain: np.ndarray


def _table(rows: Sequence[Row], names: Sequence[str]) -> _Table:
    place = {name: i for i, name in enumerate(names)}
    shape = (len(rows), len(names))
    total, weight, low, high, full = (np.zeros(shape) for _ in range(5))
    counts, certain = np.zeros(len(names), int), np.zeros(len(names), int)
    for p, row in enumerate(rows):
        for m in row.measures:
            if m.name not in place:
                continue
            i = place[m.name]
            counts[i] += 1
            low[p, i] += m.weight * m.low
            high[p, i] += m.weight * m.high
            full[p, i] += m.weight
            if math.isfinite(m.low) and m.high - m.low <= KNOWN:
                certain[i] += 1
                total[p, i] += m.weight * (m.low + m.high) / 2
                weight[p, i] += m.weight
    return _Table(list(names), total, weight, low, high, full, counts, certain)


def names_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of all figures, in their order."""
    return list(dict.fromkeys(m.name for row in rows for m in row.measures))


def summarize(rows: Sequence[Row], combine: Callable[[Sequence[str]], Weights]) -> dict[str, Any]:
    """Return each figure with its value, interval, bounds and numbers.

    A figure has `value` (None if nothing is known), `low` and `high` of its 95 % interval, `least` and `most` (bounds
    for what is unknown), `n`, `known` and `prompts`.
    """
    names = names_of(rows)
    table = _table(rows, names)
    weights = combine(names)
    values = _of_all(table.total, table.weight, names, weights)
    least = _of_all(table.low, table.full_weight, names, weights)
    most = _of_all(table.high, table.full_weight, names, weights)
    low, high = _interval(_resampled([table], weights)[0])
    figures: dict[str, Any] = {}
    for i, (name, parts) in enumerate(_parts(names, weights)):
        prompts = int((table.weight[:, parts] > 0).any(1).sum())
        bounds = (low[i], high[i])
        if prompts and math.isfinite(values[i]) and len(parts) == 1:
            bounds = _certain(table, parts[0], values[i], bounds)
        figures[name] = {
            "value": _number(values[i]),
            "low": _number(bounds[0]),
            "high": _number(bounds[1]),
            "least": _number(least[i]),
            "most": _number(most[i]),
            "n": int(table.counts[parts].sum()),
            "known": int(table.certain[parts].sum()),
            "prompts": prompts,
        }
    return figures


def _certain(
    table: _Table, i: int, value: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return Wilson's interval where all prompts are wholly right or wholly wrong, else the bounds."""
    have = table.weight[:, i] > 0
    each = table.total[have, i] / table.weight[have, i]
    if value in (0.0, 1.0) and (each == value).all():
        return wilson(value, len(each))
    return bounds


def _figures(
    total: np.ndarray, weight: np.ndarray, names: Sequence[str], weights: Weights
) -> np.ndarray:
    """Return figures (R, N + combined) of sums (R, N)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(weight > 0, total / weight, np.nan)
    place = {name: i for i, name in enumerate(names)}
    combined = [
        sum(
            (share * means[:, place[part]] for part, share in parts.items()),
            np.zeros(len(means)),
        )
        for parts in weights.values()
    ]
    return np.column_stack([means, *combined]) if combined else means


def _of_all(
    total: np.ndarray, weight: np.ndarray, names: Sequence[str], weights: Weights
) -> np.ndarray:
    """Return the figures (N + combined) of all prompts together, from sums (P, N)."""
    figures: np.ndarray = _figures(total.sum(0)[None], weight.sum(0)[None], names, weights)[0]
    return figures


def _parts(names: Sequence[str], weights: Weights) -> list[tuple[str, list[int]]]:
    """Return name and columns of each figure, in the order of `_figures`."""
    place = {name: i for i, name in enumerate(names)}
    plain = [(name, [i]) for name, i in place.items()]
    return plain + [(name, [place[part] for part in parts]) for name, parts in weights.items()]


def _resampled(tables: Sequence[_Table], weights: Weights) -> list[np.ndarray]:
    """Return the figures (R, N) of the same resamples of prompts, for each table."""
    prompts = len(tables[0].total)
    rng = np.random.default_rng(0)
    even = np.full(prompts, 1 / prompts)
    parts: list[list[np.ndarray]] = [[] for _ in tables]
    for start in range(0, RESAMPLES, CHUNK):
        size = min(CHUNK, RESAMPLES - start)
        picks = rng.multinomial(prompts, even, size=size).astype(np.float64)
        for part, table in zip(parts, tables, strict=True):
            part.append(_figures(picks @ table.total, picks @ table.weight, table.names, weights))
    return [np.concatenate(part) for part in parts]


def _interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    outside = (1 - CONFIDENCE) / 2
    # figures of few prompts are missing in some resamples
    empty = np.isnan(samples).all(0)
    filled = np.where(empty, 0.0, samples)
    low, high = np.nanquantile(filled, [outside, 1 - outside], axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def differences(
    rows: Sequence[Row], base: Sequence[Row], combine: Callable[[Sequence[str]], Weights]
) -> dict[str, Any]:
    """Return the paired difference of each figure to the base, prompt by prompt.

    A difference has `value`, `low`, `high`, `prompts`, `within_noise`, and the numbers of prompts that are better
    (`won`), equal (`tied`) and worse (`lost`). Rewards have a `win_rate` of images besides.
    """
    other_names = set(names_of(base))
    names = [name for name in names_of(rows) if name in other_names]
    weights = combine(names)
    mine, other = _table(rows, names), _table(base, names)
    # a prompt counts where both sides are known
    both = (mine.weight > 0) & (other.weight > 0)
    for table in (mine, other):
        table.total[~both] = 0
        table.weight[~both] = 0
    a, b = (_of_all(t.total, t.weight, names, weights) for t in (mine, other))
    samples = _resampled([mine, other], weights)
    low, high = _interval(samples[0] - samples[1])
    result: dict[str, Any] = {}
    for i, (name, parts) in enumerate(_parts(names, weights)):
        if not math.isfinite(a[i] - b[i]):
            continue
        prompts = int(both[:, parts].any(1).sum())
        bounds = (_number(low[i]), _number(high[i]))
        entry: dict[str, Any] = {
            "value": float(a[i] - b[i]),
            "low": bounds[0],
            "high": bounds[1],
            "prompts": prompts,
            "within_noise": verdict(*bounds, n=prompts, prompts=prompts) == "noise",
        }
        if i < len(names):
            entry |= _sides(mine, other, both[:, i], i)
        if name.startswith(REWARD):
            entry["win_rate"] = _wins(rows, base, name)
        result[name] = entry
    return result


def _sides(mine: _Table, other: _Table, have: np.ndarray, i: int) -> dict[str, int]:
    gap = mine.total[have, i] / mine.weight[have, i] - other.total[have, i] / other.weight[have, i]
    return {
        "won": int((gap > 0).sum()),
        "tied": int((gap == 0).sum()),
        "lost": int((gap < 0).sum()),
    }


def _wins(rows: Sequence[Row], base: Sequence[Row], name: str) -> dict[str, Any] | None:
    values: list[tuple[float, float, str]] = []
    for row, other in zip(rows, base, strict=True):
        theirs = {m.image: m.low for m in other.measures if m.name == name}
        values += [
            (m.low, theirs[m.image], row.prompt)
            for m in row.measures
            if m.name == name and m.image in theirs
        ]
    if not values:
        return None
    a, b, prompts = zip(*values, strict=True)
    rate = win_rate(np.array(a), np.array(b), prompts)
    return None if rate is None else rate.to_dict()


def answered(figures: Mapping[str, Any], headline: str) -> float:
    """Return the share of known values behind a headline."""
    figure = figures.get(headline)
    return figure["known"] / figure["n"] if figure and figure["n"] else 0.0
