"""Detect reward hacking in the log of a run: the trained reward rises, and something else pays for it.

Three signs are watched: a held-out reward that falls below its best evaluation, images of a prompt that become alike,
and predictions that grow beyond the reference's. Only the log is read, so that a resumed run comes to the same result
as an uninterrupted one.

Each sign has a level, and an alarm with hysteresis: the level must reach one bound in several looks running, and the
alarm ends at a lower bound. A level that moves around a bound therefore gives one alarm, not many.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.methods.online.health import WINDOW

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Bounds:
    """Bounds of an alarm.

    Attributes:
        raised: level from which the alarm is raised.
        cleared: level at which a raised alarm ends.
        looks: number of successive looks at or above `raised` that raise the alarm.
        pause: number of looks after which an alarm that has not ended is raised again.
    """

    raised: float
    cleared: float
    looks: int = 2
    pause: int = 3


FALL = Bounds(raised=1.0, cleared=0.5)
"""Bounds of a held-out reward's fall.

From 1 the 95 % intervals of the best evaluation and of this one are apart.
"""
ALIKE = Bounds(raised=0.5, cleared=0.4, pause=6)
"""Bounds of the share of the spread within groups that is lost."""
NORM = Bounds(raised=1.25, cleared=1.15, pause=6)
"""Bounds of the predictions' norm over the reference's.

Forward-process methods reach 1.05 to 1.15 without a loss of quality (NormGuard, arXiv 2606.27771).
"""


@dataclass(frozen=True)
class Sign:
    """Sign of hacking at the last row of a log.

    Attributes:
        text: what is seen, with figures.
        good: number of the last update without the sign; 0 for the base model.
    """

    text: str
    good: int


@dataclass(frozen=True)
class Hacking:
    """Verdict that a run games its reward.

    Attributes:
        update: number of the update after which it is noticed.
        good: number of the last update without any sign; 0 for the base model.
        signs: what is seen, with figures.
    """

    update: int
    good: int
    signs: tuple[str, ...]

    def __str__(self) -> str:
        since = f"update {self.good}" if self.good else "the base model"
        return (
            f"update {self.update}: the trained reward looks gamed since {since}: "
            f"{'; '.join(self.signs)}"
        )


def alarms(levels: Sequence[float], bounds: Bounds) -> list[bool]:
    """Return at which looks an alarm is raised.

    Args:
        levels: level of a sign at each look. A level that is not finite is no look, and changes nothing.
        bounds: bounds of the alarm.
    """
    raised = []
    high, since, active = 0, 0, False
    for level in levels:
        now = False
        if math.isfinite(level):
            high = high + 1 if level >= bounds.raised else 0
            since += 1
            if active and level <= bounds.cleared:
                active, high = False, 0
            elif active:
                now = high > 0 and since >= bounds.pause
            else:
                now = high >= bounds.looks
            if now:
                active, since = True, 0
        raised.append(now)
    return raised


def find_hacking(
    rows: Sequence[Row],
    before: Mapping[str, Any],
    held_out: Iterable[str],
    *,
    trained: bool = True,
) -> Hacking | None:
    """Return the verdict if the last row of the log raises an alarm, or None.

    Args:
        rows: rows of the log.
        before: evaluation before training, as in a row's `evaluation`: `means`, and `intervals` if they are known.
        held_out: names of the rewards that are evaluated but not trained on.
        trained: whether the column `reward` of evaluations is the trained reward. Otherwise it is not looked at.
    """
    signs = []
    if rows and "evaluation" in rows[-1]:
        column = "reward" if trained else ""
        signs += [s for name in held_out if (s := _fallen(rows, before, name, column)) is not None]
    if rows and len(rows) % WINDOW == 0:
        signs += [s for s in (_alike(rows), _grown(rows)) if s is not None]
    if not signs:
        return None
    return Hacking(
        rows[-1]["update"], min(s.good for s in signs), tuple(sign.text for sign in signs)
    )


def find_unscored(
    rows: Sequence[Row], before: Mapping[str, Any], held_out: Iterable[str]
) -> dict[str, str]:
    """Return warnings, by key, of held-out rewards that scored no image of an evaluation."""
    seen = [before, *(row["evaluation"] for row in rows[-1:] if "evaluation" in row)]
    return {
        f"{name} unscored": f"held-out reward {name} could score no image of an evaluation, so that it cannot show "
        "reward hacking"
        for name in held_out
        if any(evaluation and not _known(evaluation, name) for evaluation in seen)
    }


def _fallen(rows: Sequence[Row], before: Mapping[str, Any], name: str, column: str) -> Sign | None:
    """Return the sign of a held-out reward that falls while the trained reward does not."""
    looks = [(0, before), *((r["update"], r["evaluation"]) for r in rows if "evaluation" in r)]
    looks = [(update, look) for update, look in looks if _known(look, name)]
    if len(looks) < 2 or looks[0][0] != 0 or looks[-1][0] != rows[-1]["update"]:
        return None
    levels, best = [], looks[0]
    for update, look in looks[1:]:
        # without intervals a rise may be chance, and a fall is one below the base model
        if _half(look, name) is not None and _mean(look, name) > _mean(best[1], name):
            best = (update, look)
        levels.append(_fall(look, best[1], looks[0][1], name, column))
    if not alarms(levels, FALL)[-1]:
        return None
    last, first = looks[-1][1], looks[0][1]
    trained = ""
    if _known(last, column) and _known(first, column):
        trained = (
            f"the trained reward went from {_mean(first, column):.3f} to {_mean(last, column):.3f} "
            "on held-out prompts, and "
        )
    text = f"{trained}{name}, which is only looked at, fell from {_mean(best[1], name):.3f} to {_mean(last, name):.3f}"
    return Sign(text, best[0])


def _fall(now: Row, best: Row, base: Row, name: str, column: str) -> float:
    """Return a held-out reward's fall since its best evaluation, over its noise.

    Return 0 if the trained reward is not above the base model's, or has fallen, too: that is no hacking.
    """
    if all(_known(look, column) for look in (now, best, base)):
        tolerance = _half(best, column) or 0.0
        reward = _mean(now, column)
        if reward <= _mean(base, column) or reward < _mean(best, column) - tolerance:
            return 0.0
    fall = _mean(best, name) - _mean(now, name)
    halves = _half(best, name), _half(now, name)
    if halves[0] is None or halves[1] is None:
        return FALL.raised if fall > 0 else 0.0
    # the best of many evaluations is a lucky one, so that the two intervals must not overlap
    return fall / max(halves[0] + halves[1], 1e-12)


def _alike(rows: Sequence[Row]) -> Sign | None:
    """Return the sign of images that become alike while the reward has risen."""
    spread, reward = _windows(rows, "diversity"), _windows(rows, "reward", statistics.fmean)
    if not spread or not spread[0] > 0:
        return None
    levels = [
        1 - value / spread[0] if gain > reward[0] else 0.0
        for value, gain in zip(spread, reward, strict=True)
    ]
    if not alarms(levels, ALIKE)[-1]:
        return None
    text = f"the spread of a prompt's images fell from {spread[0]:.3f} to {spread[-1]:.3f}"
    return Sign(text, _last_good(rows, levels, ALIKE))


def _grown(rows: Sequence[Row]) -> Sign | None:
    """Return the sign of predictions that grow beyond the reference's."""
    levels = _windows(rows, "norm_ratio")
    if not levels or not alarms(levels, NORM)[-1]:
        return None
    text = f"predictions are {levels[-1]:.2f} times as large as the reference's"
    return Sign(text, _last_good(rows, levels, NORM))


def _windows(
    rows: Sequence[Row], name: str, middle: Callable[[list[float]], float] = statistics.median
) -> list[float]:
    """Return the middle of each window of a column, NaN for windows without a value."""
    windows = []
    for start in range(0, len(rows) - WINDOW + 1, WINDOW):
        values = [row.get(name, math.nan) for row in rows[start : start + WINDOW]]
        finite = [v for v in values if math.isfinite(v)]
        windows.append(middle(finite) if finite else math.nan)
    return windows


def _last_good(rows: Sequence[Row], levels: Sequence[float], bounds: Bounds) -> int:
    """Return the last update of the newest window below the lower bound, or 0."""
    good = [i for i, level in enumerate(levels) if level <= bounds.cleared]
    return rows[WINDOW * (good[-1] + 1) - 1]["update"] if good else 0


def _known(evaluation: Row, name: str) -> bool:
    return math.isfinite(evaluation.get("means", {}).get(name, math.nan))


def _mean(evaluation: Row, name: str) -> float:
    return float(evaluation["means"][name])


def _half(evaluation: Row, name: str) -> float | None:
    """Return half of a mean's 95 % interval, or None if it is unknown."""
    bounds = evaluation.get("intervals", {}).get("means", {}).get(name, {})
    low, high = bounds.get("low"), bounds.get("high")
    return None if low is None or high is None else float(high - low) / 2
