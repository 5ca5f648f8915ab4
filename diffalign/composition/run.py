"""Composition from a recipe: every stage made once, measured, and kept or refused."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.composition import floors
from diffalign.composition.digests import LENGTH
from diffalign.composition.floors import BelowFloor
from diffalign.composition.measuring import Clock, Measured, Meter
from diffalign.composition.plan import MODEL, STAGES, Plan, Step
from diffalign.composition.stage import State
from diffalign.config import ConfigError
from diffalign.core import locks
from diffalign.core.errors import UsageError
from diffalign.core.files import contents, write_text
from diffalign.core.versions import versions
from diffalign.evaluation.intervals import Difference

RECORD, STAGE, MAKING = "compose.json", "stage.json", "making"
"""Names of two records, and of a stage's model while it is made."""
Say = Callable[[str], object]


@dataclass(frozen=True)
class Row:
    """Model on the path from the base to the composed model.

    Attributes:
        name: name of the stage, or "base".
        title: name for people.
        state: state of the model.
        measured: its measurement.
        facts: record of the stage.
        to_base: paired differences to the base.
        to_before: paired differences to the model before.
        psnr: PSNR in dB to the images of the model before; None where it means nothing.
        failures: sentences on floors that it does not keep.
    """

    name: str
    title: str
    state: State
    measured: Measured
    facts: dict[str, Any] = field(default_factory=dict)
    to_base: dict[str, Difference] = field(default_factory=dict)
    to_before: dict[str, Difference] = field(default_factory=dict)
    psnr: float | None = None
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {
            "name": self.name,
            "model": self.state.source,
            "digest": self.state.digest,
            "figures": self.measured.figures,
            "psnr": self.psnr,
            "to_base": floors.record_of(self.to_base),
            "to_before": floors.record_of(self.to_before),
            "facts": self.facts,
            "failures": list(self.failures),
        }


@dataclass(frozen=True)
class Composed:
    """Result of a composition.

    Attributes:
        plan: checked stages.
        rows: base and all stages that keep their floors.
        stopped: stage that does not keep a floor, or None.
    """

    plan: Plan
    rows: list[Row]
    stopped: Row | None = None

    @property
    def base(self) -> Row:
        return self.rows[0]

    @property
    def last(self) -> Row:
        """Row of the composed model; the base if no stage keeps its floors."""
        return self.rows[-1]

    @property
    def folder(self) -> Path:
        """Folder of the composed model."""
        return self.plan.folder / MODEL

    @property
    def is_made(self) -> bool:
        """True if a stage keeps its floors, so that there is a composed model."""
        return len(self.rows) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "recipe": self.plan.recipe.to_dict(),
            "model": str(self.folder) if self.is_made else None,
            "stages": [row.to_dict() for row in self.rows],
            "stopped": None if self.stopped is None else self.stopped.to_dict(),
            "versions": versions(),
        }


def check_folder(folder: Path) -> None:
    """Check that the folder of a composition is new, or belongs to one.

    Raises:
        UsageError: the folder holds something else.
    """
    if contents(folder) and not (folder / RECORD).is_file() and not (folder / STAGES).is_dir():
        raise UsageError(
            f"{folder} is not empty and was not created by a composition. Choose another folder",
            setting="output_dir",
        )


def compose(
    plan: Plan,
    *,
    until: str | None = None,
    clock: Clock = time.perf_counter,
    say: Say = lambda text: None,
) -> Composed:
    """Make and measure the stages of a plan, and return the models on the path.

    A stage is made once for its inputs and settings. The same call goes on after an interruption.

    Args:
        plan: checked stages.
        until: name of the last stage to make; None makes all.
        clock: function that returns seconds.
        say: receives a line for each stage.

    Raises:
        UserError: a stage fails; all that was made so far stays.
        LockError: another process uses the folder.
    """
    steps = list(_until(plan.steps, until))
    check_folder(plan.folder)
    with locks.hold(plan.folder):
        meter = Meter(plan.recipe, plan.base, plan.folder / STAGES, clock=clock)
        say(f"base {plan.base.source}: measured on {len(meter.images())} images")
        place = plan.folder / STAGES / f"base-{plan.base.digest[:LENGTH]}"
        base = meter.measure(plan.base, place)
        floors.check_attainable([step.stage for step in steps], base)
        rows = [Row("base", plan.base.source, plan.base, base)]
        for number, step in enumerate(steps, 1):
            say(f"stage {number} of {len(steps)}: {step.stage.title} in {step.place}")
            row = _row(step, meter, rows)
            if row.failures:
                return Composed(plan, rows, row)
            rows.append(row)
    return Composed(plan, rows)


def _until(steps: list[Step], name: str | None) -> list[Step]:
    """Return the steps up to a stage."""
    if name is None:
        return steps
    names = [step.name for step in steps]
    if name not in names:
        raise ConfigError(
            f"the recipe has no such stage. Choose from {', '.join(names)}",
            setting="until",
            value=name,
        )
    return steps[: names.index(name) + 1]


def _row(step: Step, meter: Meter, rows: list[Row]) -> Row:
    """Make and measure a stage, and return its row."""
    facts = make_stage(step)
    measured = meter.measure(step.after, step.place)
    base, before = rows[0].measured, rows[-1].measured
    return Row(
        step.name,
        step.stage.title,
        step.after,
        measured,
        facts,
        floors.differences(measured, base),
        floors.differences(measured, before),
        floors.likeness(measured, before) if step.stage.keeps_images else None,
        tuple(floors.failures(step.stage, measured, base, before)),
    )


def make_stage(step: Step) -> dict[str, Any]:
    """Make the model of a stage unless it is there, and return its record."""
    model, record = step.place / MODEL, step.place / STAGE
    with locks.hold(step.place):
        if model.is_dir() and record.is_file():
            facts: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return facts
        making = step.place / MAKING
        # a killed process may have left a part of it
        shutil.rmtree(making, ignore_errors=True)
        started = time.perf_counter()
        made = step.stage.make(step.before, step.after, making, step.place)
        gc.collect()
        facts = {**made, "stage_seconds": round(time.perf_counter() - started, 1)}
        write_text(record, json.dumps(facts, indent=1))
        making.rename(model)
    return facts


def below_floor(result: Composed) -> BelowFloor:
    """Return the error for a stage that does not keep a floor."""
    row = result.stopped
    assert row is not None
    good = str(result.folder) if result.is_made else f"the base, {result.base.state.source}"
    return BelowFloor(
        f"stages.{row.name}: {'; '.join(row.failures)}. The last good model is {good}. Change the settings of the "
        "stage, or its floors"
    )
