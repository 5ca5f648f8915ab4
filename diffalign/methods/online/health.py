"""Detect collapsed runs, and runs that have nothing to learn from, in the log alone: a resumed run agrees.

Online RL on a diffusion model collapses in two ways. The gradient grows tenfold within a few updates, the reward falls
from where it had been, and neither comes back (`benchmarks/results/demo-collapse.json`). Or the policy dies: it draws
noise, all images of a prompt get the same reward, and there is no gradient any more. Each sign alone is common in
healthy runs: rewards are noisy, prompts differ from update to update, and where all images are right rewards are equal.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 5
"""Updates that are averaged before they are compared."""
REWARD_DROP = 4.0
"""Standard errors that the reward must have fallen from its best window."""
GRADIENT_RISE = 5.0
"""How many times its usual size the gradient must have."""
DIVERSITY_LEFT = 0.5
"""Share of the first updates' spread within groups below which images of a prompt have become alike."""
DIVERSITY_RISE = 1.4
"""How many times the first updates' spread within groups is noise; healthy runs stay below 1.15."""
SPREAD_LEFT = 0.1
"""Share of the rewards' usual spread within groups below which a policy is dead, where the reward has fallen, too."""


@dataclass(frozen=True)
class Collapse:
    """A policy that is lost: `good` is the last update as good as the best, `gradient_rise` None for a dead policy."""

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
    """Updates in a row without anything to learn.

    Earlier ones had something to learn: `learnt`, and the reward has held; `fallen`, and it has not.
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


def find_warnings(
    rows: Sequence[Mapping[str, Any]], before: Mapping[str, float], held_out: Iterable[str]
) -> dict[str, str]:
    """Return what else deserves a look, by what it is about.

    Images of a prompt that become alike, or that become noise; rewards that are not trained on and fell while the
    trained one rose, in two evaluations running.

    Args:
        rows: of the log.
        before: means of the evaluation before training.
        held_out: names of rewards among them.
    """
    found = {}
    update = rows[-1]["update"] if rows else 0
    spread = [r["diversity"] for r in rows if math.isfinite(r.get("diversity", math.nan))]
    if len(spread) >= 3 * WINDOW:
        first, last = (statistics.median(part) for part in (spread[:WINDOW], spread[-WINDOW:]))
        if last < DIVERSITY_LEFT * first:
            found["diversity"] = (
                f"update {update}: images of one prompt become alike: their spread fell from {first:.3f} to {last:.3f}"
            )
        elif last > DIVERSITY_RISE * first:
            found["diversity"] = (
                f"update {update}: images of one prompt come apart, perhaps into noise: their spread rose from "
                f"{first:.3f} to {last:.3f}; look at the samples, and lower optimizer.learning_rate"
            )
    seen = [r["evaluation"]["means"] for r in rows if "evaluation" in r][-2:]
    start = before.get("reward", math.inf)
    better = len(seen) == 2 and all(m.get("reward", -math.inf) > start for m in seen)
    for name in held_out:
        if better and all(m.get(name, math.inf) < before.get(name, -math.inf) for m in seen):
            found[name] = (
                f"update {update}: the trained reward rose from {before['reward']:.3f} to {seen[-1]['reward']:.3f} and "
                f"{name}, which is only looked at, fell from {before[name]:.3f} to {seen[-1][name]:.3f}"
            )
    return found


def find_collapse(rows: Sequence[Mapping[str, Any]]) -> Collapse | None:
    """Return the collapse that the last rows of the log show, or None.

    Args:
        rows: with `update`, `reward`, `grad_norm` where there was a gradient, and `reward_group_std` where it is known.
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
        # rows of a dead policy scatter less than those of the policy that was
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
    """Return the collapse of a policy that died before there was a window of healthy updates."""
    alive = [r for r in rows if not _idle(r)]
    if not alive:
        return None
    best, now = (statistics.fmean(r["reward"] for r in part) for part in (alive, rows[-WINDOW:]))
    if best - now <= statistics.median(r.get("reward_group_std", 0.0) for r in alive):
        return None
    return Collapse(rows[-1]["update"], alive[-1]["update"], now, best, None)


def find_idle(rows: Sequence[Mapping[str, Any]], limit: int) -> Idle | None:
    """Return the last `limit` updates if none of them had anything to learn from; None for a limit of 0."""
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
    """Return whether rewards within groups no longer differ in the last rows, as they did while all was well."""
    if statistics.median(map(_idle, well)):
        return False
    if statistics.median(map(_idle, last)):
        return True
    spreads = [[r.get("reward_group_std", math.nan) for r in part] for part in (last, well)]
    now, usual = (statistics.median(part) for part in spreads)
    return now < SPREAD_LEFT * usual


def _noise(rewards: Sequence[float]) -> float:
    """Return the standard deviation of rewards around their course, whatever the course, from their differences."""
    steps = [abs(b - a) for a, b in itertools.pairwise(rewards)]
    return statistics.median(steps) / 0.954  # of a normal distribution


def _gradient_rise(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return how many times its usual size the gradient of the last rows is."""
    usual, now = (
        [r["grad_norm"] for r in part if "grad_norm" in r]
        for part in (rows[:-WINDOW], rows[-WINDOW:])
    )
    if not usual or not now:
        return 0.0
    return statistics.median(now) / max(statistics.median(usual), 1e-12)
