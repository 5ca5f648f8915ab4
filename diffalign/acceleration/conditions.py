"""Conditions of the static cache: pipelines, schedulers and numbers of steps that it cannot work with."""

from __future__ import annotations

import inspect
from typing import Any

from diffalign.acceleration.tap import denoiser_name
from diffalign.core.errors import UsageError

FEW_STEPS = 8
"""Number of steps up to which a cache gains nothing."""
STOCHASTIC = ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "SCM", "ConsistencyModel", "Unclip")
"""Parts of names of schedulers that add noise in every step."""


def why_no_cache(pipeline: Any, *, steps: int) -> str | None:
    """Return the reason why a static cache cannot work, or None.

    Args:
        pipeline: a diffusers pipeline.
        steps: number of steps.
    """
    name = type(pipeline).__name__
    if denoiser_name(pipeline) is None:
        return f"{name} has neither a transformer nor a U-Net"
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "strength" in parameters:
        return f"{name} starts in the middle of its schedule, and the cache counts steps from the first one"
    if (problem := few_steps(steps)) is not None:
        return problem
    scheduler = pipeline.scheduler
    kind, config = type(scheduler).__name__, scheduler.config
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        return f"{kind} is no scheduler of diffusers"
    random = config.get("stochastic_sampling") or str(config.get("algorithm_type")).startswith(
        "sde"
    )
    if random or any(part in kind for part in STOCHASTIC):
        return f"{kind} adds noise in every step, so that predictions of neighbouring steps do not follow each other"
    if getattr(scheduler, "order", 1) > 1:
        return (
            f"{kind} is of second order: it calls the denoiser twice a step, at other noise levels"
        )
    if kind == "PNDMScheduler" and not config.get("skip_prk_steps"):
        return f"{kind} without skip_prk_steps calls the denoiser several times at one step"
    return None


def few_steps(steps: int) -> str | None:
    """Return the reason why so many steps are too few for a cache, or None."""
    if steps > FEW_STEPS:
        return None
    return f"{steps} steps are too few: the predictions of neighbouring steps differ too much"


def check_cache(pipeline: Any, *, steps: int) -> None:
    """Check that a static cache can work.

    Raises:
        UsageError: the cache cannot work; the message gives the reason and the remedy.
    """
    reason = why_no_cache(pipeline, steps=steps)
    if reason is not None:
        raise UsageError(
            f"cache: {reason}. Leave the cache out (cache=False), or use a deterministic first-order scheduler such as "
            f"EulerDiscreteScheduler with more than {FEW_STEPS} steps."
        )
