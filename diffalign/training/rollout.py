"""The plan of a rollout: which images an update makes.

An update is planned as a list of (prompt, seed) pairs that depends on the run's seed and the update's number alone, so
one process or eight, large micro-batches or small, make the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.config import RolloutConfig
from diffalign.data.prompts import Prompt
from diffalign.seeds import IMAGES, PROMPTS, stream


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


def make_plan(
    prompts: Sequence[Prompt], config: RolloutConfig, *, seed: int, update: int, balance_tasks: bool
) -> Plan:
    """Draw distinct prompts, every task equally likely (`balance_tasks`), and `group_size` images for each."""
    rng = np.random.default_rng(stream(PROMPTS, seed, update))
    wanted = min(config.prompts_per_update, len(prompts))
    order = rng.permutation(len(prompts))
    if balance_tasks:
        pools: dict[str, list[int]] = {}
        for i in order:
            pools.setdefault(prompts[i].task, []).append(int(i))
        names = sorted(pools)
        chosen: list[int] = []
        while len(chosen) < wanted:
            names = [n for n in names if pools[n]]
            for name in rng.permutation(names)[: wanted - len(chosen)]:
                chosen.append(pools[name].pop())
    else:
        chosen = [int(i) for i in order[:wanted]]
    index = torch.arange(wanted).repeat_interleave(config.group_size)
    seeds = [stream(IMAGES, seed, update, i) for i in range(len(index))]
    return Plan([prompts[i] for i in chosen], index, seeds)
