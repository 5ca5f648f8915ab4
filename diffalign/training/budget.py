"""Budget of time for a whole run: updates and evaluated images that fit, planned once from the first measured ones.

The plan is kept in the run folder. A resumed run follows it, so results depend on the plan and not on the clock again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from diffalign.core.files import write_text

BUDGET = "budget.json"
WARM_UP = 2
"""First updates of a sitting that are not measured: they compile."""
MEASURED = 4
EVALUATION_SHARE = 0.3
"""Largest part of the time that the evaluations before and after training may take together."""
RESERVE = 0.04
"""Part of the time for what is not measured: imports, the last checkpoint, the report."""


@dataclass(frozen=True)
class TimePlan:
    """What was decided, and what it was decided from.

    `images` is the part of an evaluation's images that is drawn, `updates` the number of updates, planned after update
    `planned_after`; None before that is known. `seconds` were spent when the plan was written.
    """

    images: float | None = None
    evaluation_seconds: float = 0.0
    updates: int | None = None
    planned_after: int = 0
    seconds: float = 0.0

    def scheduled(self, step: int, *, per_update: int, most: int) -> float:
        """Return the step (from 0) of a schedule over `most` updates that falls on optimizer step `step` of the plan.

        Steps before the plan are their own. After it the schedule runs faster, so that it ends with the last update.
        """
        if self.updates is None or self.updates <= self.planned_after:
            return step
        first = self.planned_after * per_update
        rate = (most - self.planned_after) / (self.updates - self.planned_after)
        return step if step < first else first + (step - first) * rate


@dataclass
class Budget:
    """Time of a run over all its sittings.

    Args:
        folder: the run folder.
        seconds: for the whole run.
        most: number of updates that is never exceeded.
        clock: seconds of any origin.
    """

    folder: Path
    seconds: float
    most: int
    clock: Callable[[], float] = time.perf_counter
    plan: TimePlan = field(default=TimePlan(), init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._earlier = 0.0
        self._ends: list[float] = []

    def resume(self) -> None:
        """Go on with the plan and the time of an earlier sitting, if the folder has them."""
        file = self.folder / BUDGET
        if file.is_file():
            self.plan = TimePlan(**json.loads(file.read_text(encoding="utf-8")))
            self._earlier = self.plan.seconds

    @property
    def spent(self) -> float:
        """Seconds of this sitting and of earlier ones, up to what they saved."""
        return self._earlier + self.clock() - self._started

    def plan_images(self, images: int, *, seconds_per_image: float) -> None:
        """Decide which part of an evaluation's `images` is drawn, before and after training."""
        fits = self.seconds * EVALUATION_SHARE / (2 * max(seconds_per_image, 1e-9))
        self._decide(images=min(1.0, fits / images))

    def measure_evaluation(self, seconds: float) -> None:
        """Keep what the evaluation before training took: the one after it takes as long."""
        self._decide(evaluation_seconds=seconds)

    def finish_update(self, update: int) -> bool:
        """Note the end of an update; return whether the number of updates has been planned now."""
        self._ends.append(self.clock())
        if self.plan.updates is not None or len(self._ends) <= WARM_UP + MEASURED - 1:
            return False
        last = self._ends[-MEASURED - 1 :]
        each = statistics.median(b - a for a, b in pairwise(last))
        left = self.seconds * (1 - RESERVE) - self.spent - self.plan.evaluation_seconds
        more = max(0, int(left / max(each, 1e-9)))
        self._decide(updates=min(self.most, update + more), planned_after=update)
        return True

    def save(self) -> None:
        """Write the plan and the time that was spent."""
        self.plan = replace(self.plan, seconds=self.spent)
        write_text(self.folder / BUDGET, json.dumps(asdict(self.plan), indent=1))

    def _decide(self, **values: float) -> None:
        self.plan = replace(self.plan, **values)  # type: ignore[arg-type]
