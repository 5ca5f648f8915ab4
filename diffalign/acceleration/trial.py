"""Search for the options of a preset that keep the images of a pipeline."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from diffalign.acceleration.adapters import check_effect
from diffalign.acceleration.attention import is_lossy, pick
from diffalign.acceleration.checking import (
    NO_EFFECT,
    Reference,
    active_adapters,
    faults_of,
    timed,
)
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.options import FLOORS, LOSSY, Options, check_preset
from diffalign.acceleration.order import apply_in_order
from diffalign.acceleration.parts import Inapplicable, denoiser_of
from diffalign.acceleration.report import Acceleration
from diffalign.acceleration.rules import Dropped, settle
from diffalign.acceleration.situation import call_of, situation_of
from diffalign.acceleration.undo import Undo
from diffalign.core.errors import UsageError


class Trial:
    """Search for the options of a preset that keep the images.

    It applies all of them, and takes one back after the other while something is wrong.
    """

    def __init__(self, pipeline: Any, preset: str, settings: Options) -> None:
        check_preset(preset)
        check_effect(denoiser_of(pipeline), set(active_adapters(pipeline)))
        self._pipeline, self._preset, self._settings = pipeline, preset, settings
        self._call = call_of(pipeline, settings)
        self._values = settings.chosen(preset)
        self._reasons: dict[str, str] = {}
        unpicked = self._pick_attention()
        situation = situation_of(pipeline, self._call, self._values)
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
                report = apply_in_order(
                    self._pipeline, self._active, self._call, self._settings, self.undo
                )
            except Inapplicable as error:
                if self._values[error.option][1]:
                    raise
                remedy = error.remedy[0].lower() + error.remedy[1:]
                self._take_back(error.option, error.why, remedy)
                continue
            report.preset, report.dropped = self._preset, self._dropped
            report.reasons |= {o: r for o, r in self._reasons.items() if o in self._active}
            if plain is None or not self._is_worse(report, check, plain):
                self._warm_up(report)
                return report

    def _warm_up(self, report: Acceleration) -> None:
        """Compile for all sizes and numbers of images, unless nothing shall be drawn."""
        if report.declared is None:
            return
        for height, width in report.plan.sizes if self._settings.check else ():
            for images in report.plan.batch_sizes:
                sized = replace(self._call.take(images), height=height, width=width)
                draw(self._pipeline, sized)
        report.declared.close()

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
