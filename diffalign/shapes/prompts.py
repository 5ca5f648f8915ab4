"""Prompts of Shapes in GenEval's tasks and metadata format, split into train and held-out.

The language is small enough to list: every prompt of every task exists once, and a fixed number of each task is held
out. No model of this suite (base models, text encoders, alignment) is trained on a held-out prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from diffalign.geneval.rules import NUMBERS, RELATIONS, TASKS, Metadata, clause, entry, plural
from diffalign.shapes.world import COLORS, KINDS

HELD_OUT = {
    "single_object": 1,
    "two_object": 5,
    "counting": 4,
    "colors": 8,
    "position": 20,
    "color_attr": 60,
}
SPLITS = ("train", "held_out")
SPLIT_SEED = 43


@cache
def _all_prompts() -> dict[str, list[Metadata]]:
    pairs = [(a, b) for a in KINDS for b in KINDS if a != b]
    shades = [(c, d) for c in COLORS for d in COLORS if c != d]
    return {
        "single_object": [entry("single_object", [clause(a)], f"a {a}") for a in KINDS],
        "two_object": [
            entry("two_object", [clause(a), clause(b)], f"a {a} and a {b}") for a, b in pairs
        ],
        "counting": [
            entry("counting", [clause(a, n)], f"{word} {plural(a)}", exclude=[clause(a, n + 1)])
            for n, word in NUMBERS.items()
            for a in KINDS
        ],
        "colors": [
            entry("colors", [clause(a, color=c)], f"a {c} {a}") for a in KINDS for c in COLORS
        ],
        "position": [
            entry("position", [clause(b), clause(a, position=[r, 0])], f"a {a} {r} a {b}")
            for a, b in pairs
            for r in RELATIONS
        ],
        "color_attr": [
            entry(
                "color_attr", [clause(a, color=c), clause(b, color=d)], f"a {c} {a} and a {d} {b}"
            )
            for a, b in pairs
            for c, d in shades
        ],
    }


@cache
def _split(split: str) -> tuple[Metadata, ...]:
    rng = np.random.default_rng(SPLIT_SEED)
    entries: list[Metadata] = []
    for task in TASKS:
        prompts = _all_prompts()[task]
        order = rng.permutation(len(prompts))
        part = order[: HELD_OUT[task]] if split == "held_out" else order[HELD_OUT[task] :]
        entries += [prompts[i] for i in sorted(part)]
    return tuple(entries)


def prompts(split: str) -> list[Metadata]:
    """Return all prompts of "train" or "held_out" as GenEval metadata, by task.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Choose from {', '.join(SPLITS)}.")
    return list(_split(split))


def sample_prompts(
    rng: np.random.Generator,
    n: int,
    *,
    split: str = "train",
    task_weights: Mapping[str, float] | None = None,
) -> list[Metadata]:
    """Draw `n` prompts: a task by its weight, then one of the task's prompts.

    All tasks have the same weight by default.
    """
    by_task: dict[str, list[Metadata]] = {}
    for prompt in prompts(split):
        by_task.setdefault(prompt["tag"], []).append(prompt)
    tasks = list(by_task.values())
    if task_weights is None:
        picks = (tasks[rng.integers(len(tasks))] for _ in range(n))
    else:
        weights = np.array([task_weights[task] for task in by_task], float)
        numbers = rng.choice(len(tasks), size=n, p=weights / weights.sum())
        picks = (tasks[number] for number in numbers)
    return [pool[rng.integers(len(pool))] for pool in picks]
