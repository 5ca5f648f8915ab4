"""Acceleration of a pipeline in place, its report, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from diffalign.acceleration.drawing import Call
from diffalign.acceleration.fitting import check_fits
from diffalign.acceleration.options import PRESETS, Arguments, Options
from diffalign.acceleration.order import apply_in_order
from diffalign.acceleration.report import Acceleration, Plan
from diffalign.acceleration.tap import denoiser_name
from diffalign.acceleration.trial import Trial
from diffalign.acceleration.undo import Undo
from diffalign.core.errors import UsageError

ATTRIBUTE = "_diffalign_acceleration"
"""Attribute of an accelerated pipeline that holds its report."""


def accelerate(
    pipeline: Any, preset: str | Path | Plan = "balanced", **options: Unpack[Arguments]
) -> Any:
    """Make a diffusers pipeline faster in place, check the images, and return the same pipeline.

    Args:
        pipeline: pipeline of diffusers that draws images of prompts.
        preset: "lossless", "balanced", "fast" or "small"; a plan, or the path of one.
        options: options of `acceleration.options.Options`. One that is "auto" is the preset's choice and is left out
            where it cannot work, which `acceleration(pipeline)` tells.

    Returns:
        The pipeline.

    Raises:
        UsageError: the pipeline is not supported or accelerated already; an option does not exist; options that the
            caller named exclude each other; the plan belongs to another model; or an image is damaged.
    """
    _check_pipeline(pipeline)
    if isinstance(preset, Plan):
        plan: Plan | None = preset
    else:
        is_path = preset not in PRESETS and (
            Path(preset).suffix == ".json" or Path(preset).is_dir()
        )
        plan = Plan.load(preset) if is_path else None
    if plan is not None:
        if options:
            raise UsageError(
                f"{', '.join(options)}: a plan has its own options. Leave them out, or name a preset."
            )
        return _put_in_force(pipeline, plan)
    trial = Trial(pipeline, str(preset), Options.of(options))
    try:
        report = trial.run()
    except BaseException:
        trial.undo.back()
        raise
    setattr(pipeline, ATTRIBUTE, report)
    return pipeline


def report_of(pipeline: Any) -> Acceleration:
    """Return the report of a pipeline's acceleration.

    Raises:
        UsageError: the pipeline is not accelerated.
    """
    report: Acceleration | None = getattr(pipeline, ATTRIBUTE, None)
    if report is None:
        raise UsageError(
            f"{type(pipeline).__name__}: this pipeline is not accelerated. Call `accelerate` first."
        )
    return report


def restore(pipeline: Any, *, check: bool = False) -> Any:
    """Undo a pipeline's acceleration, prove that it is what it was, and return it.

    The proof compares every bit of the weights, the modules, LoRAs, hooks, processors, and the scheduler.

    Args:
        check: draw the check's images again, too, and compare them pixel for pixel with the plain ones.

    Raises:
        UsageError: the pipeline is not accelerated; something else changed it, which the message names; or `check` is
            set and the acceleration was made without images.
    """
    report = report_of(pipeline)
    if check:
        report.need_reference()
    delattr(pipeline, ATTRIBUTE)
    report.undo.run()
    if check and not report.need_reference().is_plain():
        raise UsageError(
            "restore: the pipeline's state is what it was, and its images are not. This device may not compute the "
            "same twice; draw the images of two plain calls to see. Load the pipeline again otherwise."
        )
    return pipeline


@contextmanager
def accelerated(
    pipeline: Any, preset: str | Path | Plan = "balanced", **options: Unpack[Arguments]
) -> Iterator[Any]:
    """Accelerate a pipeline in a block, and restore it at its end; see `accelerate`."""
    accelerate(pipeline, preset, **options)
    try:
        yield pipeline
    finally:
        if hasattr(pipeline, ATTRIBUTE):
            restore(pipeline)


def _check_pipeline(pipeline: Any) -> None:
    name = type(pipeline).__name__
    if not hasattr(pipeline, "components") or denoiser_name(pipeline) is None:
        raise UsageError(
            f"{name}: this is no diffusers pipeline with a transformer or a U-Net. Pass the pipeline itself."
        )
    if getattr(pipeline, ATTRIBUTE, None) is not None:
        raise UsageError(
            f"{name}: this pipeline is accelerated already. Call `restore` first to change its acceleration."
        )


def _put_in_force(pipeline: Any, plan: Plan) -> Any:
    """Apply a plan after checking that it belongs to the pipeline."""
    check_fits(pipeline, plan)
    height, width = plan.sizes[0]
    call = Call(plan.steps, height, width)
    undo = Undo(pipeline)
    try:
        report = apply_in_order(
            pipeline,
            plan.options,
            call,
            Options(
                sizes=plan.sizes, batch_sizes=plan.batch_sizes, lora_rank=plan.lora_rank, check=0
            ),
            undo,
            plan.schedules,
        )
    except BaseException:
        undo.back()
        raise
    report.plan = replace(report.plan, measured=plan.measured)
    if report.declared is not None:
        report.declared.close()
    setattr(pipeline, ATTRIBUTE, report)
    return pipeline
