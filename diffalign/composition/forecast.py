"""Forecast of a composition before anything is loaded: memory, work, time and disk."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffalign.composition.plan import MODEL, Plan
from diffalign.composition.stage import State, device, held_bytes
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_json
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.score import repeat_prompts
from diffalign.pipelines.drawing import Drawing
from diffalign.training.memory import GIB, size_of
from diffalign.training.memory_fit import free_memory

SHARE = 0.4
"""Share of the rate of plain matrix products that a denoiser is assumed to reach."""
SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the matrices whose product is timed."""
REPEATS = 5
MARGIN = 1.05
"""Files besides weights, relative to the weights."""


@dataclass(frozen=True)
class StageForecast:
    """Forecast of one stage, of its measurement, and of the files that it leaves.

    Attributes:
        name: name of the stage, or "base".
        memory: bytes on the device; None if they cannot be told.
        flops: floating-point operations of the stage.
        measuring: floating-point operations of the measurement.
        disk: bytes that are still to be written.
        is_made: True for a stage that is there already.
    """

    name: str
    memory: int | None
    flops: float
    measuring: float
    disk: float
    is_made: bool = False


def forecasts(plan: Plan) -> list[StageForecast]:
    """Forecast the base's measurement and every stage; models are on the meta device."""
    images = _images(plan)
    base, operations = plan.base, Operations()
    measuring = operations.drawing(base, images)
    rows = [StageForecast("base", held_bytes(base.model), 0.0, measuring, 0.0)]
    disk = 0.0
    for step in plan.steps:
        forecast = step.stage.forecast(step.before)
        is_made = (step.place / MODEL).is_dir()
        disk = MARGIN * _disk(step.after)
        rows.append(
            StageForecast(
                step.name,
                forecast.memory,
                # a move trains the moved model
                forecast.forwards * operations.of_row(step.after),
                operations.drawing(step.after, images),
                0.0 if is_made else disk,
                is_made,
            )
        )
    copied = 0.0 if (plan.folder / MODEL).is_dir() else disk
    return [*rows, StageForecast("composed folder", None, 0.0, 0.0, copied)]


def _images(plan: Plan) -> int:
    s = plan.recipe.measure
    drawing = Drawing(images_per_prompt=s.images_per_prompt, images_per_task=s.images_per_task)
    return len(repeat_prompts(load_prompts(s.prompts, limit=s.max_prompts), drawing))


def _disk(state: State) -> float:
    """Return the bytes of a state's folder."""
    model = state.model
    denoiser = size_of(model.denoiser)
    return held_bytes(model) - denoiser * (1 - state.weights_ratio)


class Operations:
    """Counter of the denoiser's operations on the meta device, once for each denoiser and size."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}

    def of_row(self, state: State) -> float:
        """Return the operations of the denoiser for one image."""
        model = state.model
        size = model.image_size((state.card.height, state.card.width))
        key = of_json([dict(model.denoiser.config), size], default=str)
        if key not in self._counts:
            inputs = model.random_inputs(1, size)
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), counter:
                model.forward(*inputs)
            self._counts[key] = float(counter.get_total_flops())
        return self._counts[key]

    def drawing(self, state: State, images: int) -> float:
        """Return the operations of drawing images, without encoders and decoder."""
        rows = state.model.forward_rows(images, state.card.guidance_scale)
        return rows * state.card.num_inference_steps * self.of_row(state)


def measured_rate(dtype: str) -> float:
    """Measure the operations per second of plain matrix products on the device of the stages."""
    place = device()
    side = SIDE[place]
    matrix = torch.ones(side, side, dtype=getattr(torch, dtype), device=place)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        product = matrix @ matrix
        if place == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        del product
    return float(2 * side**3 / min(seconds[1:]))


def describe(rows: list[StageForecast], rate: float) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return columns and rows of the table of a forecast.

    Args:
        rows: forecast of each stage.
        rate: operations per second of plain matrix products.
    """
    cells: list[tuple[str, ...]] = []
    for row in rows:
        work = 0.0 if row.is_made else row.flops + row.measuring
        cells.append(
            (
                row.name + (" (made)" if row.is_made else ""),
                "" if row.memory is None else f"{row.memory / GIB:.2f}",
                f"{work / 1e15:.3g}",
                f"{work / (SHARE * rate) / 3600:.2g}",
                f"{row.disk / GIB:.2f}",
            )
        )
    return ["", "GiB of memory", "PFLOP", "hours", "GiB of disk"], cells


def notes(rows: list[StageForecast], rate: float, folder: Path) -> list[str]:
    """Return lines that compare a forecast with the machine."""
    least = min(free_memory(), key=lambda room: room.free)
    total = sum(row.flops + row.measuring for row in rows if not row.is_made)
    lines = [
        f"hours are the operations of the denoiser, at {SHARE:.0%} of the {rate / 1e12:.3g} TFLOP/s that plain matrix "
        "products reach on this device now. Encoders, decoders, rewards and reading are not counted",
        f"in all {total / (SHARE * rate) / 3600:.2g} hours, {sum(r.disk for r in rows) / GIB:.2f} GiB of disk",
        f"free: {least.free / GIB:.2f} GiB on {least.where}, {free_disk(folder) / GIB:.2f} GiB of disk",
    ]
    large = [r.name for r in rows if r.memory is not None and r.memory > least.free]
    if large:
        lines.append(f"these stages may not fit into memory: {', '.join(large)}")
    return lines


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist."""
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(parent).free


def check_disk(plan: Plan) -> None:
    """Check that the folders of all stages fit on the disk.

    Raises:
        UsageError: they do not.
    """
    needed = sum(
        MARGIN * _disk(step.after) for step in plan.steps if not (step.place / MODEL).is_dir()
    )
    free = free_disk(plan.folder)
    if needed > free:
        raise UsageError(
            f"the stages' folders need {needed / GIB:.2f} GiB, and the disk has {free / GIB:.2f} GiB free. Free space, "
            "or name a folder on another disk",
            setting="output_dir",
            value=plan.folder,
        )
