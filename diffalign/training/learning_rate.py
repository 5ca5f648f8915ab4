"""Schedules of the learning rate."""

from __future__ import annotations

import math

from diffalign.config import OptimizerConfig


def lr_factor(step: float, config: OptimizerConfig, *, total: int) -> float:
    """Return the fraction of the learning rate at an optimizer step.

    The fraction depends on the step alone, so that a resumed run needs no state of a scheduler.

    Args:
        step: number of the optimizer step, from 0.
        total: number of optimizer steps of the whole run.
    """
    warmup = config.warmup_updates
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.lr_scheduler == "linear":
        return 1 - done
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
