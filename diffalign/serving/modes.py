"""Modes: what an image skips of its steps, decided for each image by its own step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from diffalign.acceleration.apply import ATTRIBUTE, accelerate, report_of, restore
from diffalign.acceleration.options import CHOICES, INTERVAL, check_preset
from diffalign.acceleration.report import Acceleration, Plan
from diffalign.acceleration.request import has_levels_of
from diffalign.acceleration.schedule import Schedule
from diffalign.core.errors import UsageError
from diffalign.serving.tickets import PLAIN

EVERY = 2
"""Steps between two computed negative predictions with the guidance "reuse"."""
BY_STEP = ("cache", "guidance")
"""Options that the engine applies to each image by its own step.

A pipeline's own hooks count the steps of a whole call, and images of one batch are at different steps.
"""


@dataclass(frozen=True)
class Mode:
    """Computation that images of one preset skip.

    Attributes:
        schedules: schedules of the static cache, one for each row of noise levels.
        guidance: "interval", "reuse", or empty for guidance in every step.
    """

    name: str = PLAIN
    schedules: tuple[Schedule, ...] = ()
    guidance: str = ""

    def schedule_for(self, scheduler: Any) -> Schedule | None:
        """Return the schedule for a scheduler's noise levels, or None to compute every step."""
        return next((s for s in self.schedules if has_levels_of(s.request, scheduler)), None)

    def guides(self, step: int, steps: int) -> bool:
        """Return whether a step computes the negative prediction."""
        if self.guidance == "interval":
            return INTERVAL[0] <= step / steps < INTERVAL[1]
        return self.guidance != "reuse" or step % EVERY == 0


def prepare(
    pipeline: Any, presets: tuple[str, ...], **options: Any
) -> tuple[list[Mode], list[Acceleration]]:
    """Accelerate a pipeline for an engine, and return its modes and their reports.

    Options that change weights or kernels are in force on the pipeline afterwards. The static cache and the options of
    guidance are the modes'. The first mode is that of the first preset; the last computes every step.

    Args:
        presets: names of `acceleration.options.PRESETS`, the default first. Without one, the plan in force on the
            pipeline is the default, if it has one.
        options: further arguments of `accelerate`.

    Raises:
        UsageError: a preset does not exist, or two of them need different weights; or as in `accelerate`.
    """
    for name in presets:
        check_preset(name)
    reports: list[Acceleration] = []
    if getattr(pipeline, ATTRIBUTE, None) is not None:
        if not presets:
            reports.append(report_of(pipeline))
        restore(pipeline)
    for name in presets:
        accelerate(pipeline, name, **options)
        reports.append(report_of(pipeline))
        restore(pipeline)
    _check_together(reports)
    modes = [_mode_of(r, presets[i] if presets else "plan") for i, r in enumerate(reports)]
    if reports and (static := _static(reports[0].plan)).options:
        accelerate(pipeline, static)
    return [*modes, Mode()], reports


def _mode_of(report: Acceleration, name: str) -> Mode:
    """Return the mode of a report."""
    guidance = str(report.applied.get("guidance", ""))
    if guidance and guidance not in CHOICES["guidance"]:
        raise UsageError(
            f"guidance={guidance}: the engine cannot draw with a LoRA in place of guidance. Merge it into the model "
            "(`diffalign merge`), and serve that with guidance_scale 1."
        )
    return Mode(name, report.plan.schedules, guidance)


def _static(plan: Plan) -> Plan:
    """Return a plan without the options that the engine applies itself."""
    options = {k: v for k, v in plan.options.items() if k not in BY_STEP}
    return replace(plan, options=options, schedules=())


def _check_together(reports: list[Acceleration]) -> None:
    """Raise UsageError if presets put different weights in force."""
    weights = {str(r.applied.get("quantize")) for r in reports}
    if len(weights) > 1:
        names = ",".join(r.preset for r in reports)
        raise UsageError(
            f"preset={names}: one of them quantises the weights and another does not, so that one server cannot have "
            "both. Start a server for each."
        )
