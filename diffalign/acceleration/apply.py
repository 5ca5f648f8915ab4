"""Acceleration of a pipeline in place: choose, apply in order, check, and take back what costs too much."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from diffalign.acceleration.attention import is_lossy, parts_of, pick, set_attention
from diffalign.acceleration.cache import Cache
from diffalign.acceleration.calibration import calibrate
from diffalign.acceleration.checking import (
    NO_EFFECT,
    Reference,
    active_adapters,
    faults_of,
    timed,
)
from diffalign.acceleration.conditions import why_no_cache
from diffalign.acceleration.drawing import PROMPTS, Call, default_steps, draw, psnr
from diffalign.acceleration.guidance import Guidance, guides
from diffalign.acceleration.options import (
    CHOICES,
    FLOORS,
    LOSSY,
    PRESETS,
    STATIC,
    Arguments,
    Options,
    check_preset,
)
from diffalign.acceleration.parts import (
    Inapplicable,
    compile_parts,
    denoiser_of,
    offload,
    quantize,
    save_memory,
)
from diffalign.acceleration.report import Acceleration, Plan
from diffalign.acceleration.rules import Dropped, Situation, settle
from diffalign.acceleration.schedule import Schedule
from diffalign.acceleration.tap import Chain, Handler, Tap, denoiser_name
from diffalign.acceleration.undo import Undo
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import UnknownWeights, of_denoiser
from diffalign.core.versions import versions

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
    trial = _Trial(pipeline, str(preset), Options.of(options))
    try:
        report = trial.run()
    except BaseException:
        trial.undo.back()
        raise
    setattr(pipeline, ATTRIBUTE, report)
    return pipeline


class _Trial:
    """Search for the options of a preset that keep the images.

    It applies all of them, and takes one back after the other while something is wrong.
    """

    def __init__(self, pipeline: Any, preset: str, settings: Options) -> None:
        check_preset(preset)
        self._pipeline, self._preset, self._settings = pipeline, preset, settings
        self._call = _call_of(pipeline, settings)
        self._values = settings.chosen(preset)
        self._reasons: dict[str, str] = {}
        unpicked = self._pick_attention()
        situation = _situation(pipeline, self._call, self._values)
        self._active, self._dropped = settle(self._values, situation)
        self._dropped += unpicked
        self._floor = FLOORS[preset] if settings.floor is None else settings.floor
        self.undo = Undo(pipeline)

    def _pick_attention(self) -> list[Dropped]:
        """Replace "auto" by the backend for this machine, or return why torch's own choice stays."""
        if self._values.get("attention", ("", False))[0] != "auto":
            return []
        choice = pick(denoiser_of(self._pipeline))
        if choice.backend is None:
            del self._values["attention"]
            return [Dropped("attention", choice.why, choice.remedy)]
        self._values["attention"] = choice.backend, False
        self._reasons["attention"] = choice.why
        return []

    def run(self) -> Acceleration:
        """Return the report of the options that remain, which are in force then."""
        check = self._call.take(self._settings.check)
        plain = None
        if self._settings.check:
            # the first call of a process pays for much that has nothing to do with the pipeline
            draw(self._pipeline, replace(check.take(1), steps=2))
            plain = timed(self._pipeline, check)
        while True:
            try:
                report = _apply(self._pipeline, self._active, self._call, self._settings, self.undo)
            except Inapplicable as error:
                if self._values[error.option][1]:
                    raise
                remedy = error.remedy[0].lower() + error.remedy[1:]
                self._take_back(error.option, error.why, remedy)
                continue
            report.preset, report.dropped = self._preset, self._dropped
            report.reasons = {o: r for o, r in self._reasons.items() if o in self._active}
            if plain is None or not self._is_worse(report, check, plain):
                return report

    def _is_worse(self, report: Acceleration, call: Call, plain: tuple[Any, float]) -> bool:
        """Check the images, and take one option back if something is wrong."""
        problem = _measure(report, call, plain, self._floor)
        lossy = [o for o in reversed(LOSSY) if o in self._active]
        if is_lossy(self._active.get("attention")):
            lossy.append("attention")
        weakest = lossy[0] if lossy else None
        if problem is not None and weakest is None:
            raise UsageError(f"accelerate: {problem}. The pipeline is restored; report this.")
        if problem is not None and weakest is not None:
            self._take_back(weakest, problem, "lower `floor`, or choose a milder value")
            return True
        ratio = report.measured["ratio"]
        if "compile" in self._active and not self._values["compile"][1] and ratio < 1:
            why = f"with it a call takes {1 / ratio:.2f} times as long as without"
            self._take_back("compile", why, "name it to compile anyway: compile='blocks'")
            return True
        return False

    def _take_back(self, option: str, why: str, remedy: str) -> None:
        self.undo.back()
        del self._active[option]
        self._dropped.append(Dropped(option, why, remedy))


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


def _call_of(pipeline: Any, options: Options) -> Call:
    """Return the call that the first of the sizes is calibrated and checked with."""
    steps = options.steps or default_steps(pipeline)
    height, width = options.sizes[0] if options.sizes else _default_size(pipeline)
    prompts = tuple(options.prompts) or PROMPTS
    return Call(steps, height, width, prompts, dict(options.arguments), options.seed)


def _default_size(pipeline: Any) -> tuple[int, int]:
    from diffalign.pipelines.registry import FAMILIES, wrap_pipeline

    if type(pipeline).__name__ in FAMILIES:
        height, width = wrap_pipeline(pipeline).default_size
        return height, width
    raise UsageError(
        f"sizes=(): the default size of {type(pipeline).__name__} is unknown. Pass sizes=((height, width),)."
    )


def _situation(pipeline: Any, call: Call, active: Mapping[str, Any]) -> Situation:
    from diffalign.pipelines.compiled import blocks

    denoiser = denoiser_of(pipeline)
    device = denoiser.device
    is_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if is_cuda else (0, 0)
    guide = True
    if "guidance" in active:
        # a pipeline learns its guidance in a call only
        draw(pipeline, replace(call.take(1), steps=2))
        guide = guides(pipeline)
    return Situation(
        steps=call.steps,
        device=device.type,
        capability=capability,
        cache_problem=why_no_cache(pipeline, steps=call.steps),
        has_lora=bool(getattr(denoiser, "peft_config", None)),
        has_factors=bool(pipeline.scheduler.config.get("qsched")),
        is_quantized=bool(getattr(denoiser, "is_quantized", False)),
        guides=guide,
        attention_parts=len(parts_of(denoiser)),
        block_lists=bool(blocks(denoiser)),
    )


def _apply(
    pipeline: Any,
    active: Mapping[str, Any],
    call: Call,
    settings: Options,
    undo: Undo,
    schedules: tuple[Schedule, ...] = (),
) -> Acceleration:
    """Apply the options in their order, and return the report without a check."""
    fingerprints = [_fingerprint(pipeline)]
    if "quantize" in active and not getattr(denoiser_of(pipeline), "is_quantized", False):
        quantize(pipeline, str(active["quantize"]), undo)
        fingerprints.append(_fingerprint(pipeline))
    if "attention" in active:
        probe = partial(draw, pipeline, replace(call.take(1), steps=2)) if settings.check else None
        set_attention(denoiser_of(pipeline), str(active["attention"]), undo, probe=probe)
    if "cache" in active or "guidance" in active:
        schedules = _tap(pipeline, active, call, undo, schedules, settings.sizes)
    if "compile" in active:
        compile_parts(denoiser_of(pipeline), undo)
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
        settings.sizes or ((call.height, call.width),),
        schedules,
        versions=versions(),
        device=denoiser_of(pipeline).device.type,
    )
    return Acceleration("plan", plan, [], undo)


def _fingerprint(pipeline: Any) -> str:
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
    for height, width in sizes or ((call.height, call.width),):
        sized = replace(call, height=height, width=width)
        schedule = calibrate(pipeline, sized, target=target, inside=handlers)
        if all(schedule.request != s.request for s in schedules):
            schedules.append(schedule)
    return tuple(schedules)


def _measure(
    report: Acceleration, call: Call, plain: tuple[Any, float], floor: float
) -> str | None:
    """Draw the images of the check, and return what is wrong with them."""
    pipeline = report.undo.pipeline
    if "compile" in report.applied:
        draw(pipeline, call)
    images, seconds = timed(pipeline, call)
    before, plain_seconds = plain
    values = psnr(images, before)
    figures = {
        "plain_seconds": plain_seconds,
        "seconds": seconds,
        "ratio": plain_seconds / seconds,
        "psnr": statistics.median(values),
        "worst_psnr": min(values),
        "images": float(len(values)),
    }
    report.plan = replace(report.plan, measured=figures)
    adapters = active_adapters(pipeline)
    report.reference = Reference(pipeline, call, before, images, adapters, floor)
    faults = faults_of(images)
    if faults and not faults_of(before):
        return faults[0]
    if adapters and _is_without_effect(pipeline, call, images):
        return f"the LoRA {', '.join(adapters)} has no effect on the images"
    if figures["psnr"] < floor:
        return f"the images have {figures['psnr']:.1f} dB to the plain ones, below the floor of {floor:g} dB"
    return None


def _is_without_effect(pipeline: Any, call: Call, images: Any) -> bool:
    """Return whether the images are the same without the pipeline's LoRA."""
    denoiser = denoiser_of(pipeline)
    denoiser.disable_adapters()
    try:
        return statistics.median(psnr(draw(pipeline, call), images)) > NO_EFFECT
    finally:
        denoiser.enable_adapters()


def _put_in_force(pipeline: Any, plan: Plan) -> Any:
    """Apply a plan after checking that it belongs to the pipeline."""
    name = type(pipeline).__name__
    if plan.pipeline != name:
        raise UsageError(
            f"preset: the plan is for {plan.pipeline}, and this is {name}. Accelerate with a preset instead."
        )
    if _fingerprint(pipeline) not in plan.denoiser:
        raise UsageError(
            "preset: the plan belongs to other weights of the denoiser. Accelerate with a preset instead."
        )
    if plan.scheduler != type(pipeline.scheduler).__name__:
        raise UsageError(
            f"preset: the plan is for {plan.scheduler}, and the pipeline has "
            f"{type(pipeline.scheduler).__name__}. Put the scheduler back, or accelerate with a preset."
        )
    height, width = plan.sizes[0]
    call = Call(plan.steps, height, width)
    undo = Undo(pipeline)
    try:
        report = _apply(pipeline, plan.options, call, Options(check=0), undo, plan.schedules)
    except BaseException:
        undo.back()
        raise
    report.plan = replace(report.plan, measured=plan.measured)
    setattr(pipeline, ATTRIBUTE, report)
    return pipeline
