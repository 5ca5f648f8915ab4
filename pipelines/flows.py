"""Diffusion path of a pipeline whose scheduler is one of flows."""

from __future__ import annotations

from typing import Any

from diffalign.core.errors import UsageError
from diffalign.diffusion.paths import RectifiedFlow


def flow_of(scheduler: Any, *, family: str) -> RectifiedFlow:
    """Return the path of a scheduler of flows.

    Raises:
        UsageError: the scheduler is one of another path.
    """
    config = scheduler.config
    flow = (
        type(scheduler).__name__.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") in ("flow_prediction", "trigflow")
    )
    if not flow or "num_train_timesteps" not in config:
        raise UsageError(
            f"scheduler {type(scheduler).__name__}: {family} models are rectified flows, and this is no scheduler of "
            "flows; put FlowMatchEulerDiscreteScheduler into the pipeline"
        )
    return RectifiedFlow(config.num_train_timesteps)
