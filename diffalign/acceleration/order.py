"""Options of an acceleration, applied in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from diffalign.acceleration.adapters import guard_loras, load_for_guidance
from diffalign.acceleration.attention import set_attention
from diffalign.acceleration.cache import Cache
from diffalign.acceleration.calibration import calibrate
from diffalign.acceleration.compilation import compile_parts
from diffalign.acceleration.declared import Declared
from diffalign.acceleration.drawing import Call, draw
from diffalign.acceleration.guidance import Guidance
from diffalign.acceleration.options import CHOICES, STATIC, Options
from diffalign.acceleration.parts import (
    denoiser_of,
    lay_out,
    offload,
    quantize,
    save_memory,
)
from diffalign.acceleration.report import Acceleration, Plan
from diffalign.acceleration.request import scheduler_settings
from diffalign.acceleration.schedule import Schedule
from diffalign.acceleration.tap import Chain, Handler, Tap
from diffalign.acceleration.undo import Undo
from diffalign.core.fingerprint import UnknownWeights, of_denoiser
from diffalign.core.versions import versions


def apply_in_order(
    pipeline: Any,
    active: Mapping[str, Any],
    call: Call,
    settings: Options,
    undo: Undo,
    schedules: tuple[Schedule, ...] = (),
) -> Acceleration:
    """Apply the options in their order, and return the report without a check."""
    reasons: dict[str, str] = {}
    sizes = settings.sizes or ((call.height, call.width),)
    fingerprints = [fingerprint_of(pipeline)]
    if "quantize" in active and not getattr(denoiser_of(pipeline), "is_quantized", False):
        quantize(pipeline, str(active["quantize"]), undo)
        fingerprints.append(fingerprint_of(pipeline))
    if "layout" in active:
        lay_out(pipeline, undo)
    guard_loras(pipeline, undo, rank=settings.lora_rank, compiled="compile" in active)
    if "attention" in active:
        probe = partial(draw, pipeline, replace(call.take(1), steps=2)) if settings.check else None
        set_attention(denoiser_of(pipeline), str(active["attention"]), undo, probe=probe)
    if "cache" in active or "guidance" in active:
        schedules = _tap(pipeline, active, call, undo, schedules, sizes)
    declared = Declared(sizes, settings.batch_sizes) if "compile" in active else None
    if declared is not None:
        reasons["compile"] = compile_parts(pipeline, declared, undo)
    if "offload" in active:
        offload(pipeline, str(active["offload"]), undo)
    if "vae" in active:
        save_memory(pipeline.vae, str(active["vae"]), undo)
    plan = Plan(
        type(pipeline).__name__,
        tuple(fingerprints),
        type(pipeline.scheduler).__name__,
        {name: active[name] for name in CHOICES if name in active},
        call.steps,
        sizes,
        schedules,
        batch_sizes=settings.batch_sizes,
        scheduler_settings=scheduler_settings(pipeline.scheduler),
        lora_rank=settings.lora_rank,
        versions=versions(),
        device=denoiser_of(pipeline).device.type,
    )
    return Acceleration("plan", plan, [], undo, reasons=reasons, declared=declared)


def fingerprint_of(pipeline: Any) -> str:
    """Return the fingerprint of a pipeline's denoiser.

    Return "unknown" if its weights are not in memory.
    """
    try:
        return of_denoiser(pipeline)
    except UnknownWeights:
        return "unknown"


def _tap(
    pipeline: Any,
    active: Mapping[str, Any],
    call: Call,
    undo: Undo,
    schedules: tuple[Schedule, ...],
    sizes: tuple[tuple[int, int], ...],
) -> tuple[Schedule, ...]:
    """Put guidance and cache in force, and return the cache's schedules."""
    handlers: tuple[Handler, ...] = ()
    if "guidance" in active:
        if active["guidance"] not in CHOICES["guidance"]:
            load_for_guidance(pipeline, str(active["guidance"]), undo)
        handlers = (Guidance(pipeline, str(active["guidance"]), steps=call.steps),)
    if "cache" in active:
        if not schedules:
            value = active["cache"]
            target = STATIC if value == "static" else float(value)
            schedules = _calibrated(pipeline, handlers, call, target, sizes)
        handlers = (Cache(schedules), *handlers)
    undo.add(Tap(pipeline, Chain(handlers)).remove)
    return schedules


def _calibrated(
    pipeline: Any,
    handlers: tuple[Handler, ...],
    call: Call,
    target: float,
    sizes: tuple[tuple[int, int], ...],
) -> tuple[Schedule, ...]:
    """Return a schedule for each size whose noise levels are its own."""
    schedules: list[Schedule] = []
    for height, width in sizes:
        sized = replace(call, height=height, width=width)
        schedule = calibrate(pipeline, sized, target=target, inside=handlers)
        if all(schedule.request != s.request for s in schedules):
            schedules.append(schedule)
    return tuple(schedules)
