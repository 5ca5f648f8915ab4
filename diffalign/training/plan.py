"""Plan which prompts an update draws, and which process makes which image."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.config import (
    DistillationRunConfig,
    PromptsConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    nearest,
)
from diffalign.core.errors import UsageError
from diffalign.core.seeds import IMAGES, PROMPTS, stream
from diffalign.data.prompts import Prompt, is_file

MISSPELT = 0.5
"""Likeness of two names, from which on one may be the other misspelt."""


@dataclass(frozen=True)
class Plan:
    """One update: `prompts` (P), and for each of its B images the row of its prompt and the seed of its noise."""

    prompts: list[Prompt]
    prompt_index: Tensor
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def shard(self, rank: int, world_size: int) -> range:
        """The contiguous share of the images that one process makes."""
        return range(len(self) * rank // world_size, len(self) * (rank + 1) // world_size)


def check_prompts(
    prompts: Sequence[Prompt], config: RunConfig | DistillationRunConfig
) -> list[str]:
    """Check that an update can be drawn from the prompts; return what the user should know of it.

    Task weights that fit no prompt of a user's file are dropped: a recipe has them for its own prompts.

    Raises:
        UsageError: a weight names a task that looks misspelt, or no task is left.
    """
    part = "rollout" if isinstance(config, RunConfig) else "teacher"
    wanted: int = getattr(config, part).prompts_per_update
    source, weights = config.prompts.train, config.prompts.task_weights or {}
    names = sorted({p.task for p in prompts})
    absent = [name for name in weights if name not in names]
    for name in absent:
        others = [n for n in names if n not in weights]
        if not is_file(source) or difflib.get_close_matches(name, others, cutoff=MISSPELT):
            raise UsageError(
                f"prompts.task_weights: no prompt has the task {name!r}{nearest(name, names)}"
            )
    if all(weights.get(name, 1.0) == 0 for name in names):
        raise UsageError("prompts.task_weights: every task of the prompts has weight 0")
    notices = []
    if absent:
        notices.append(
            f"prompts.task_weights: no prompt of {source} has the task {', '.join(absent)}; their weights are dropped"
        )
    count = len(_drawable(prompts, config.prompts))
    if count < wanted:
        notices.append(
            f"{part}.prompts_per_update is {wanted}, and prompts.train={source} has {count} to draw: each is repeated, "
            f"with other noise. {part}.prompts_per_update={count} draws each once"
        )
    return notices


def _drawable(prompts: Sequence[Prompt], tasks: PromptsConfig) -> list[int]:
    """Return the indices of prompts whose task has a weight."""
    weights = tasks.task_weights or {}
    every = not tasks.balance_tasks
    return [i for i, p in enumerate(prompts) if every or weights.get(p.task, 1.0) > 0]


def make_plan(
    prompts: Sequence[Prompt],
    config: RolloutConfig | TeacherConfig,
    *,
    seed: int,
    update: int,
    tasks: PromptsConfig,
) -> Plan:
    """Draw prompts and `group_size` images for each; `tasks` says how often each task is drawn.

    Prompts are distinct; where there are too few, all are drawn before one returns.
    """
    rng = np.random.default_rng(stream(PROMPTS, seed, update))
    wanted = config.prompts_per_update
    order = [int(i) for i in rng.permutation(len(prompts))]
    drawable = set(_drawable(prompts, tasks))
    order = [i for i in order if i in drawable]
    rounds = (wanted - 1) // len(order)
    left = wanted - rounds * len(order)
    last = order
    if tasks.balance_tasks:
        last = _by_task(prompts, order, left, tasks.task_weights or {}, rng)
    chosen = order * rounds + last[:left]
    index = torch.arange(len(chosen)).repeat_interleave(config.group_size)
    seeds = [stream(IMAGES, seed, update, i) for i in range(len(index))]
    return Plan([prompts[i] for i in chosen], index, seeds)


def _by_task(
    prompts: Sequence[Prompt],
    order: list[int],
    wanted: int,
    weights: Mapping[str, float],
    rng: np.random.Generator,
) -> list[int]:
    """`wanted` of the indices in `order`: systematic sampling over tasks, each has its share within one prompt."""
    pools: dict[str, list[int]] = {}
    for i in order:
        pools.setdefault(prompts[i].task, []).append(i)
    names = [str(n) for n in rng.permutation(sorted(pools))]
    shares = np.cumsum([weights.get(n, 1.0) for n in names])
    points = (np.arange(wanted) + rng.random()) / wanted * shares[-1]
    found = []
    for k in np.searchsorted(shares, points, side="right"):
        if pools[names[k]]:
            found.append(pools[names[k]].pop())
    rest = [i for name in names for i in pools[name]]  # a task with few prompts is used up
    return found + rest[: wanted - len(found)]
