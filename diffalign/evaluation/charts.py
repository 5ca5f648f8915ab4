"""Learning curves as SVG: axes with ticks, the values of each update, and a smoothed line over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 34
"""Margins for tick labels."""
SMOOTHING = 0.05
"""Time constant of the smoothed line, as a share of the updates."""
FEW = 12
"""Values below which a line needs no smoothing."""


@dataclass(frozen=True)
class Tick:
    """Mark on an axis: its place in pixels and its label."""

    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Chart ready for the page; `raw` and `smooth` are points of SVG lines."""

    title: str
    raw: str
    smooth: str | None
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    last: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(title: str, updates: Sequence[float], values: Sequence[Any]) -> Chart | None:
    """Return the chart of a value over updates. Return None for fewer than two finite values."""
    points = [
        (float(u), float(v))
        for u, v in zip(updates, values, strict=True)
        if v is not None and math.isfinite(v)
    ]
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    x_ticks = [v for v in ticks(0.0, float(x.max())) if v == round(v)]
    y_ticks = ticks(float(y.min()), float(y.max()))
    low, high, end = y_ticks[0], y_ticks[-1], max(x_ticks[-1], float(x.max()))

    def across(value: float) -> float:
        return LEFT + value / end * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def line(heights: np.ndarray) -> str:
        return " ".join(f"{across(u):.1f},{down(v):.1f}" for u, v in zip(x, heights, strict=True))

    return Chart(
        title,
        raw=line(y),
        smooth=line(smoothed(y)) if len(y) >= FEW else None,
        x_ticks=[Tick(across(v), label(v, x_ticks)) for v in x_ticks],
        y_ticks=[Tick(down(v), label(v, y_ticks)) for v in y_ticks],
        last=float(y[-1]),
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the exponential moving average of values (N,), without the bias of its beginning."""
    decay = math.exp(-1 / max(3.0, SMOOTHING * len(values)))
    total, weight = 0.0, 0.0
    result = np.empty(len(values))
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        result[i] = total / weight
    return result


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Return round numbers that cover `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if high - low <= max(abs(low), abs(high)) * 1e-9:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, marks: Sequence[float]) -> str:
    """Return a tick's label with as many digits as tell the marks apart."""
    step = marks[1] - marks[0]
    largest = max(map(abs, marks))
    if largest >= 1e5 or step < 1e-4:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-") if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}"
