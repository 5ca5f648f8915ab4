"""Floors: limits that the model of a stage must keep, or the composition stops at the one before.

`geneval` and rewards are least differences to the base, `fid` is the largest rise over the base's, and `psnr` the least
likeness in dB to the images of the stage before. The PSNR counts where a stage keeps the images: quantisation, Q-Sched
and acceleration.
"""

from __future__ import annotations

from typing import Any

from diffalign.composition.measuring import Measured
from diffalign.composition.recipe import FID, GENEVAL, PSNR
from diffalign.composition.stage import Stage
from diffalign.config import ConfigError
from diffalign.core.errors import UserError
from diffalign.evaluation.figures import number
from diffalign.evaluation.intervals import Difference
from diffalign.evaluation.likeness import psnr


class BelowFloor(UserError, RuntimeError):
    """Stage whose model does not keep a floor."""

    exit_code = 1


def differences(measured: Measured, other: Measured) -> dict[str, Difference]:
    """Return the paired difference to another model of GenEval and of each reward."""
    both = measured.evaluation.differences(other.evaluation)
    overall = both["tasks"].get("overall")
    return {**({} if overall is None else {GENEVAL: overall}), **both["means"]}


def likeness(measured: Measured, before: Measured) -> float | None:
    """Return the PSNR in dB of the stored images to those of another model.

    Return None for images of another size.
    """
    own, other = measured.evaluation.images, before.evaluation.images
    return psnr(own, other) if own.shape == other.shape else None


def failures(stage: Stage, measured: Measured, base: Measured, before: Measured) -> list[str]:
    """Return a sentence for each floor that a stage does not keep.

    A floor is compared with the measured value, not with its interval.
    """
    changes = differences(measured, base)
    sentences = []
    for name, floor in stage.floors.items():
        if name == PSNR:
            value = likeness(measured, before) if stage.keeps_images else None
            is_kept = value is None or value >= floor
            text = (
                f"{name} {number(value or 0.0)} dB to the stage before, and the floor is {floor:g}"
            )
        elif name == FID:
            value = measured.figures[FID] - base.figures[FID]
            is_kept = value <= floor
            text = (
                f"{name} {number(value, sign=True)} to the base, and the largest rise is {floor:g}"
            )
        else:
            change = changes.get(name)
            is_kept = change is not None and change.value >= floor
            value = None if change is None else change.value
            shown = "not measured" if value is None else number(value, sign=True)
            text = f"{name} {shown} to the base, and the floor is {floor:g}"
        if not is_kept:
            sentences.append(text)
    return sentences


def check_attainable(stages: list[Stage], base: Measured) -> None:
    """Check against the measured base that each floor of GenEval can be met.

    Raises:
        ConfigError: the base has no GenEval, or no score of 0 to 1 keeps the floor.
    """
    for stage in stages:
        floor = stage.floors.get(GENEVAL)
        if floor is None:
            continue
        setting = f"stages.{stage.name}.floors" if GENEVAL in stage.settings.floors else "floors"
        if base.geneval is None:
            raise ConfigError(
                "no reward of measure.rewards tells which images are correct. Add verifier or geneval",
                setting=f"{setting}.{GENEVAL}",
            )
        if base.geneval + floor > 1:
            raise ConfigError(
                f"no stage can meet it, because the base has {number(base.geneval)} of at most 1. Lower the floor",
                setting=f"{setting}.{GENEVAL}",
                value=floor,
            )


def record_of(changes: dict[str, Difference]) -> dict[str, Any]:
    """Return differences for JSON."""
    return {name: change.to_dict() for name, change in changes.items()}
