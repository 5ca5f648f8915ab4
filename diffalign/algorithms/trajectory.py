"""Common parts of losses on the stochastic steps of a rollout.

The module of such a loss ends with a `TrajectoryLoss`, which the registry of methods names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign.algorithms.forward_process import Metrics


@dataclass(frozen=True)
class StochasticStep:
    """Distribution of the latents x' after one step, given x.

    Attributes:
        mean: means (B, ...).
        std: standard deviations (B,).
        diffusion: s (B,) of the SDE; std for "cps".
    """

    mean: Tensor
    std: Tensor
    diffusion: Tensor


@dataclass(frozen=True)
class TrajectorySample:
    """B stochastic steps of rollouts.

    Attributes:
        step: distribution of the steps under the policy.
        log_probs: log-probabilities (B,) of the steps that the rollout took, under the policy.
        old_log_probs: log-probabilities (B,) of the same steps under the policy that sampled them.
        advantages: advantages (B,), neither clipped nor scaled.
        old_mean: means (B, ...) of the steps under that policy; None if the settings do not need them.
    """

    step: StochasticStep
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    old_mean: Tensor | None = None


@dataclass(frozen=True)
class TrajectoryLoss:
    """Loss on the stochastic steps of a rollout.

    Attributes:
        loss: maps a sample and the algorithm's settings to the losses (B,) and their metrics, (B,) each.
        metrics: names of the metrics.
    """

    loss: Callable[[TrajectorySample, Any], tuple[Tensor, Metrics]]
    metrics: tuple[str, ...]
