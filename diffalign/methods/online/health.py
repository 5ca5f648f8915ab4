"""Detect collapsed training runs, and runs that have nothing to learn from.

Only the log is read, so that a resumed run comes to the same result as an uninterrupted one.

Online RL on a diffusion model collapses in two ways. In the first, the gradient grows tenfold within a few updates, the
reward falls, and neither recovers (`benchmarks/results/demo-collapse.json`). In the second, the policy dies: it samples
noise, all images of a prompt get the same reward, and there is no gradient any more. Each sign alone is common in
healthy runs: rewards are noisy, prompts differ between updates, and rewards are equal if all images are right.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 5
"""Number of updates in a window; the means of windows are compared."""
REWARD_DROP = 4.0
"""Smallest fall of a collapsed run's reward from its best window, in standard errors."""
GRADIENT_RISE = 5.0
"""Smallest ratio of a collapsed run's gradient norm to its usual norm."""
DIVERSITY_LEFT = 0.5
"""Ratio of the spread within groups to the first updates', below which images are alike."""
DIVERSITY_RISE = 1.4
"""Ratio of the spread within groups to the first updates', above which images are noise.

Healthy runs stay below 1.15.
"""
SPREAD_LEFT = 0.1
"""Ratio of the rewards' spread within groups to the usual, below which policies are dead.

The reward must have fallen, too.
"""


@dataclass(frozen=True)
class Collapse:
    """Collapse of a policy at an update.

    Attributes:
        update: number of the update after which the collapse is noticed.
        good: number of the last update before the collapse.
        reward: mean reward of the last window.
        best: mean reward of the best window.
        gradient_rise: ratio of the gradient norm to its usual norm, None for a dead policy.
    """

    update: int
    good: int
    reward: float
    best: float
    gradient_rise: float | None

    def __str__(self) -> str:
        sign = "all images of a prompt get the same reward, so that nothing is left to learn from"
        if self.gradient_rise is not None:
            sign = f"the gradient is {self.gradient_rise:.0f} times its usual size"
        return (
            f"update {self.update}: the run looks collapsed: the reward fell from {self.best:.3f} (around update "
            f"{self.good}) to {self.reward:.3f}, and {sign}; a lower optimizer.learning_rate or a higher "
            "algorithm.kl_beta holds the policy"
        )


@dataclass(frozen=True)
class Idle:
    """Series of updates in which there was nothing to learn from.

    Attributes:
        update: number of the last update.
        updates: number of updates in the series.
        reward: mean reward of the series.
        learnt: true if earlier updates had something to learn from and the reward has not fallen since.
        fallen: true if earlier updates had something to learn from and the reward has fallen since.
    """

    update: int
    updates: int
    reward: float
    learnt: bool
    fallen: bool

    def __str__(self) -> str:
        seen = (
            f"update {self.update}: in {self.updates} updates in a row all images of a prompt had the same reward "
            f"(mean {self.reward:.3f}), so that there was nothing to learn from"
        )
        if self.learnt:
            return f"{seen}; training ends here (training.max_idle_updates)"
        if self.fallen:
            return (
                f"{seen}, and the reward is lower than it was: the policy is lost. Start again in another output_dir "
                "with a lower optimizer.learning_rate or a higher algorithm.kl_beta; training.max_idle_updates=0 goes "
                "on regardless"
            )
        return (
            f"{seen}. Check the reward on a few images (`diffalign evaluate rewards`), take prompts that the model "
            "draws now right and now wrong (prompts.train), or draw more images of each (rollout.group_size); "
            "training.max_idle_updates=0 goes on regardless"
        )


def find_warnings(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return warnings, as a dictionary from "diversity" to a text.

    Images of a prompt may become alike, or may become noise.

    Args:
        rows: rows of the log.
    """
    spread = [r["diversity"] for r in rows if math.isfinite(r.get("diversity", math.nan))]
    if len(spread) < 3 * WINDOW:
        return {}
    update = rows[-1]["update"]
    first, last = (statistics.median(part) for part in (spread[:WINDOW], spread[-WINDOW:]))
    if last < DIVERSITY_LEFT * first:
        return {
            "diversity": f"update {update}: images of one prompt become alike: their spread fell from {first:.3f} to "
            f"{last:.3f}"
        }
    if last > DIVERSITY_RISE * first:
        return {
            "diversity": f"update {update}: images of one prompt come apart, perhaps into noise: their spread rose "
            f"from {first:.3f} to {last:.3f}; look at the samples, and lower optimizer.learning_rate"
        }
    return {}


def find_collapse(rows: Sequence[Mapping[str, Any]]) -> Collapse | None:
    """Return the collapse that the last rows of the log show, or None.

    Args:
        rows: rows of the log with `update` and `reward`. A row has `grad_norm` if its update had a gradient, and
            `reward_group_std` if that is known.
    """
    rows = [r for r in rows if math.isfinite(r.get("reward", math.nan))]
    if len(rows) < 3 * WINDOW:
        return None
    rewards = [r["reward"] for r in rows]
    means = [statistics.fmean(rewards[i - WINDOW : i]) for i in range(WINDOW, len(rewards) + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    well, rise = rows[best : best + WINDOW], None
    if statistics.median(map(_idle, well)) and all(map(_idle, rows[-WINDOW:])):
        return _early_death(rows)
    if _dead(rows[-WINDOW:], well):
        # The rewards of a dead policy scatter less than before its death, so the larger noise counts.
        noise = max(_noise(rewards[:-WINDOW]), _noise(rewards[: best + WINDOW]))
    else:
        noise, rise = _noise(rewards[:-WINDOW]), _gradient_rise(rows)
        if rise < GRADIENT_RISE:
            return None
    error = noise * (2 / WINDOW) ** 0.5
    if means[best] - means[-1] <= REWARD_DROP * error:
        return None
    good = max(i for i, mean in enumerate(means) if mean >= means[best] - REWARD_DROP / 2 * error)
    window = rows[good : good + WINDOW]
    last = ([r for r in window if not _idle(r)] or window)[-1]
    return Collapse(rows[-1]["update"], last["update"], means[-1], means[best], rise)


def _early_death(rows: Sequence[Mapping[str, Any]]) -> Collapse | None:
    """Return the collapse of a policy that died before its first window of healthy updates."""
    alive = [r for r in rows if not _idle(r)]
    if not alive:
        return None
    best, now = (statistics.fmean(r["reward"] for r in part) for part in (alive, rows[-WINDOW:]))
    if best - now <= statistics.median(r.get("reward_group_std", 0.0) for r in alive):
        return None
    return Collapse(rows[-1]["update"], alive[-1]["update"], now, best, None)


def find_idle(rows: Sequence[Mapping[str, Any]], limit: int) -> Idle | None:
    """Return the last `limit` updates if none of them had anything to learn from.

    Return None otherwise, and for a limit of 0.
    """
    last = rows[-limit:] if limit else []
    if not last or len(last) < limit or not all(_idle(r) for r in last):
        return None
    mean = statistics.fmean(r["reward"] for r in last)
    alive = [r["reward"] for r in rows if not _idle(r)]
    held = bool(alive) and mean >= statistics.fmean(alive) and find_collapse(rows) is None
    return Idle(last[-1]["update"], limit, mean, learnt=held, fallen=bool(alive) and not held)


def _idle(row: Mapping[str, Any]) -> bool:
    """Return whether all images of every prompt had the same reward in this update."""
    same = row.get("reward_group_std", math.inf) <= 1e-6 * max(1.0, abs(row["reward"]))
    return "grad_norm" not in row or same


def _dead(last: Sequence[Mapping[str, Any]], well: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether rewards within groups differ no longer in the last rows.

    They must have differed in the rows `well` of the healthy policy.
    """
    if statistics.median(map(_idle, well)):
        return False
    if statistics.median(map(_idle, last)):
        return True
    spreads = [[r.get("reward_group_std", math.nan) for r in part] for part in (last, well)]
    now, usual = (statistics.median(part) for part in spreads)
    return bool(now < SPREAD_LEFT * usual)


def _noise(rewards: Sequence[float]) -> float:
    """Return the standard deviation of rewards around their trend.

    It is estimated from differences of successive rewards, which hardly depend on the trend.
    """
    steps = [abs(b - a) for a, b in itertools.pairwise(rewards)]
    # For independent normal rewards, the median absolute difference is 0.954 standard deviations.
    return statistics.median(steps) / 0.954


def _gradient_rise(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the ratio of the last rows' gradient norm to the usual one, both medians."""
    usual, now = (
        [r["grad_norm"] for r in part if "grad_norm" in r]
        for part in (rows[:-WINDOW], rows[-WINDOW:])
    )
    if not usual or not now:
        return 0.0
    return float(statistics.median(now) / max(statistics.median(usual), 1e-12))
