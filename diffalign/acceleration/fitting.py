"""Checks that a plan belongs to a pipeline, before anything of it is applied."""

from __future__ import annotations

import logging
from typing import Any

from diffalign.acceleration.drawing import Call
from diffalign.acceleration.order import fingerprint_of
from diffalign.acceleration.parts import denoiser_of
from diffalign.acceleration.report import Plan
from diffalign.acceleration.request import scheduler_settings
from diffalign.acceleration.rules import settle
from diffalign.acceleration.situation import situation_of
from diffalign.core.errors import UsageError
from diffalign.core.versions import versions

logger = logging.getLogger(__name__)
DECISIVE = ("torch", "diffusers")
"""Packages whose versions decide on the speed and the rounding of a plan."""


def check_fits(pipeline: Any, plan: Plan) -> None:
    """Check that a plan belongs to a pipeline, and that its options can work there.

    Another device and other versions are warned about: images stay right, and speed and rounding may differ.

    Raises:
        UsageError: the plan is for another model, weights or scheduler, or a rule excludes one of its options.
    """
    name = type(pipeline).__name__
    if plan.pipeline != name:
        raise UsageError(
            f"preset: the plan is for {plan.pipeline}, and this is {name}. Accelerate with a preset instead."
        )
    if fingerprint_of(pipeline) not in plan.denoiser:
        raise UsageError(
            "preset: the plan belongs to other weights of the denoiser. Accelerate with a preset instead."
        )
    _check_scheduler(pipeline.scheduler, plan)
    _check_rules(pipeline, plan)
    device, own = denoiser_of(pipeline).device.type, versions()
    others = [n for n in DECISIVE if plan.versions.get(n, own.get(n)) != own.get(n)]
    if device != plan.device:
        others.insert(0, "the device")
    if others:
        logger.warning(
            "preset: the plan was made with another version of %s, or on another device (%s, here %s); its figures "
            "may not hold. Accelerate anew to measure them.",
            *(", ".join(others), plan.device, device),
        )


def _check_scheduler(scheduler: Any, plan: Plan) -> None:
    name = type(scheduler).__name__
    if plan.scheduler != name:
        raise UsageError(
            f"preset: the plan is for {plan.scheduler}, and the pipeline has {name}. Put the scheduler back, or "
            "accelerate with a preset."
        )
    settings = scheduler_settings(scheduler)
    # plans of earlier versions know the class only
    if plan.scheduler_settings not in ("", settings) and "cache" in plan.options:
        raise UsageError(
            f"preset: the plan's cache was calibrated with other settings of {name}, such as its shift. Put the "
            "settings back, or accelerate with a preset."
        )


def _check_rules(pipeline: Any, plan: Plan) -> None:
    """Raise UsageError if a rule excludes an option of the plan here."""
    call = Call(plan.steps, *plan.sizes[0])
    # nothing is drawn, so that what guidance costs is not looked at
    situation = situation_of(pipeline, call, {})
    # weights that were saved quantised are not quantised again
    values = {
        option: (value, True)
        for option, value in plan.options.items()
        if not (option == "quantize" and situation.is_quantized)
    }
    settle(values, situation)
