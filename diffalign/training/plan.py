"""Plan which prompts an update draws, and which process makes which image."""

from __future__ import annotations

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
from diffalign.data.prompts import Prompt


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


def check_prompts(prompts: Sequence[Prompt], config: RunConfig | DistillationRunConfig) -> None:
    """UsageError where weights name tasks that no prompt has, or leave none, or where an update cannot have as many
    distinct prompts as it wants."""
    part = "rollout" if isinstance(config, RunConfig) else "teacher"
    wanted: int = getattr(config, part).prompts_per_update
    tasks = config.prompts
    weights = tasks.task_weights or {}
    names = {p.task for p in prompts}
    for name in weights:
        if name not in names:
            raise UsageError(
                f"prompts.task_weights: no prompt has the task {name!r}{nearest(name, sorted(names))}"
            )
    if all(weights.get(name, 1.0) == 0 for name in names):
        raise UsageError("prompts.task_weights: every task of the prompts has weight 0")
    drawn = [p for p in prompts if not tasks.balance_tasks or weights.get(p.task, 1.0) > 0]
    if len(drawn) < wanted:
        of_tasks = "" if len(drawn) == len(prompts) else " of tasks that have a weight"
        raise UsageError(
            f"{part}.prompts_per_update is {wanted}, and prompts.train has {len(drawn)} prompts{of_tasks}: give more "
            "prompts, or draw fewer at a time and more images of each (group_size)"
        )


def make_plan(
    prompts: Sequence[Prompt],
    config: RolloutConfig | TeacherConfig,
    *,
    seed: int,
    update: int,
    tasks: PromptsConfig,
) -> Plan:
    """Draw distinct prompts and `group_size` images for each; `tasks` says how often which task is drawn."""
    rng = np.random.default_rng(stream(PROMPTS, seed, update))
    wanted = config.prompts_per_update
    chosen = [int(i) for i in rng.permutation(len(prompts))]
    if tasks.balance_tasks:
        chosen = _by_task(prompts, chosen, wanted, tasks.task_weights or {}, rng)
    chosen = chosen[:wanted]
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
        if weights.get(prompts[i].task, 1.0) > 0:
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
