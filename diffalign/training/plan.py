"""Plan the prompts and seeds of an update, and the share of each process."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.config import AnyRunConfig, PlanConfig, PromptsConfig, nearest
from diffalign.core.errors import UsageError
from diffalign.core.seeds import IMAGES, PROMPTS, stream
from diffalign.data.prompts import Prompt, is_file

MISSPELT = 0.5
"""Smallest similarity of two names at which one may be a misspelling of the other."""


def share(count: int, rank: int, world_size: int) -> range:
    """Return the items, of `count` over all processes, that one process works on: a contiguous range."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


@dataclass(frozen=True)
class Plan:
    """Plan of an update with P prompts and B images.

    Attributes:
        prompts: prompts of the update (P).
        prompt_index: index of each image's prompt (B,).
        seeds: seed of each image's noise (B,).
    """

    prompts: list[Prompt]
    prompt_index: Tensor
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def shard(self, rank: int, world_size: int) -> range:
        """Return the indices of the images that one process samples, a contiguous range."""
        return share(len(self), rank, world_size)


def check_share(count: int, world_size: int, *, setting: str, unit: str = "images") -> None:
    """Check that every process has a part of an update.

    Args:
        count: images, or pairs, of an update over all processes.
        setting: name of the setting that decides `count`.

    Raises:
        UsageError: the update has fewer images than there are processes.
    """
    if count < world_size:
        raise UsageError(
            f"{setting} is {count}: fewer {unit} than processes ({world_size}). Start fewer processes, or raise the "
            "setting"
        )


def check_prompts(prompts: Sequence[Prompt], config: AnyRunConfig) -> list[str]:
    """Check that an update can be planned, and return notes for the user.

    Task weights that match no prompt of a user's file are dropped with a note, because a recipe's weights are meant for
    its own prompts.

    Raises:
        UsageError: a weight names a task that no prompt has and that looks misspelt, or every task has weight 0.
    """
    plan, tasks = config.plan, config.training_prompts
    if plan is None or tasks is None:
        return []
    setting, num_prompts = f"{plan.group}.prompts_per_update", plan.prompts_per_update
    source, weights = tasks.train, tasks.task_weights or {}
    names = sorted({p.task for p in prompts})
    absent = [name for name in weights if name not in names]
    for name in absent:
        others = [n for n in names if n not in weights]
        if not is_file(source) or difflib.get_close_matches(name, others, cutoff=MISSPELT):
            raise UsageError(
                f"no prompt has the task {name!r}{nearest(name, names)}",
                setting="prompts.task_weights",
            )
    if all(weights.get(name, 1.0) == 0 for name in names):
        raise UsageError(
            "every task of the prompts has weight 0. Give one of them a weight above 0",
            setting="prompts.task_weights",
        )
    notices = []
    if absent:
        notices.append(
            f"prompts.task_weights: no prompt of {source} has the task {', '.join(absent)}; their weights are dropped"
        )
    count = len(_drawable(prompts, tasks))
    if count < num_prompts:
        notices.append(
            f"{setting} is {num_prompts}, and prompts.train={source} has {count} to draw: each is "
            f"repeated, with other noise. {setting}={count} draws each once"
        )
    return notices


def _drawable(prompts: Sequence[Prompt], tasks: PromptsConfig) -> list[int]:
    """Return the indices of the prompts that can be drawn: those whose task does not have weight 0."""
    weights = tasks.task_weights or {}
    every = not tasks.balance_tasks
    return [i for i, p in enumerate(prompts) if every or weights.get(p.task, 1.0) > 0]


def make_plan(
    prompts: Sequence[Prompt],
    config: PlanConfig,
    *,
    seed: int,
    update: int,
    tasks: PromptsConfig,
) -> Plan:
    """Draw the prompts of an update, and the seeds of the images of each.

    The prompts are distinct. If there are too few, every prompt is drawn before one is repeated.

    Args:
        prompts: prompts of the training set.
        config: numbers of prompts and of images of each.
        seed: seed of the run.
        update: number of the update, from 1.
        tasks: settings with the weights of tasks.
    """
    rng = np.random.default_rng(stream(PROMPTS, seed, update))
    num_prompts = config.prompts_per_update
    order = [int(i) for i in rng.permutation(len(prompts))]
    drawable = set(_drawable(prompts, tasks))
    order = [i for i in order if i in drawable]
    rounds = (num_prompts - 1) // len(order)
    left = num_prompts - rounds * len(order)
    last = order
    if tasks.balance_tasks:
        last = _by_task(prompts, order, left, tasks.task_weights or {}, rng)
    selected = order * rounds + last[:left]
    index = torch.arange(len(selected)).repeat_interleave(config.images_per_prompt)
    seeds = [stream(IMAGES, seed, update, i) for i in range(len(index))]
    return Plan([prompts[i] for i in selected], index, seeds)


def _by_task(
    prompts: Sequence[Prompt],
    order: list[int],
    count: int,
    weights: Mapping[str, float],
    rng: np.random.Generator,
) -> list[int]:
    """Return `count` of the indices in `order`, and give each task its share.

    The number of a task's prompts differs from its share by less than one (systematic sampling). If a task has too few
    prompts, prompts of other tasks take their places.
    """
    pools: dict[str, list[int]] = {}
    for i in order:
        pools.setdefault(prompts[i].task, []).append(i)
    names = [str(n) for n in rng.permutation(sorted(pools))]
    shares = np.cumsum([weights.get(n, 1.0) for n in names])
    points = (np.arange(count) + rng.random()) / count * shares[-1]
    selected = []
    for k in np.searchsorted(shares, points, side="right"):
        if pools[names[k]]:
            selected.append(pools[names[k]].pop())
    # a task with too few prompts is used up, and other tasks fill its share
    rest = [i for name in names for i in pools[name]]
    return selected + rest[: count - len(selected)]
