"""Is the run still learning, or has the policy left the ground? Read from the log alone, so that a resumed run agrees.

Online RL on a diffusion model collapses in one way: the gradient grows tenfold within a few updates, the reward falls
from where it had been, and neither comes back (`benchmarks/results/demo-collapse.json`). Either sign alone is common in
healthy runs: rewards are noisy, and prompts differ from update to update.
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


@dataclass(frozen=True)
class Collapse:
    """`good`: the last update of the best window, where the policy was still well."""

    update: int
    good: int
    reward: float
    best: float
    gradient_rise: float

    def __str__(self) -> str:
        return (
            f"update {self.update}: the run looks collapsed: the reward fell from {self.best:.3f} (around update "
            f"{self.good}) to {self.reward:.3f}, and the gradient is {self.gradient_rise:.0f} times its usual size; "
            "a lower optimizer.learning_rate or a higher algorithm.kl_beta holds the policy"
        )


def find_warnings(
    rows: Sequence[Mapping[str, Any]], before: Mapping[str, float], held_out: Iterable[str]
) -> dict[str, str]:
    """What else deserves a look, by what it is about: images of a prompt that become alike, and rewards that are not
    trained on and fell while the trained one rose, in two evaluations running.

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
    """Whether the last rows of the log (`update`, `reward`, `grad_norm`) show a collapse."""
    rows = [r for r in rows if "grad_norm" in r and r["reward"] == r["reward"]]
    if len(rows) < 3 * WINDOW:
        return None
    rewards = [r["reward"] for r in rows]
    means = [statistics.fmean(rewards[i - WINDOW : i]) for i in range(WINDOW, len(rewards) + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    # successive differences: what the reward scatters around its course, whatever the course
    steps = [abs(b - a) for a, b in itertools.pairwise(rewards[:-WINDOW])]
    noise = statistics.median(steps) / 0.954  # of a normal distribution
    error = noise * (2 / WINDOW) ** 0.5
    gradients = [r["grad_norm"] for r in rows]
    usual = statistics.median(gradients[:-WINDOW])
    rise = statistics.median(gradients[-WINDOW:]) / max(usual, 1e-12)
    fallen = means[best] - means[-1] > REWARD_DROP * error
    if not fallen or rise < GRADIENT_RISE:
        return None
    good = rows[best + WINDOW - 1]["update"]
    return Collapse(rows[-1]["update"], good, means[-1], means[best], rise)
