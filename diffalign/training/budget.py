"""Plan how many updates and evaluated images fit into a run's time.

The plan is made once, from the first updates and images that are measured, and saved in the run folder. A resumed run
follows it. Results then depend on the plan, and not on the clock again.
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
"""Number of a sitting's first updates that are not measured, because they compile."""
MEASURED = 4
"""Number of updates that are measured for the plan."""
EVALUATION_SHARE = 0.3
"""Largest fraction of the time for the evaluations before and after training together."""
RESERVE = 0.04
"""Fraction of the time for what is not measured: imports, the last checkpoint and the report."""


@dataclass(frozen=True)
class TimePlan:
    """Plan of a run's time, and the measurements that it was made from.

    Attributes:
        images: fraction of an evaluation's images that is sampled, None before it is planned.
        evaluation_seconds: duration of the evaluation before training.
        updates: number of updates of the whole run, None before it is planned.
        planned_after: number of the update after which `updates` was planned.
        seconds: time of the run that was spent when the plan was saved.
    """

    images: float | None = None
    evaluation_seconds: float = 0.0
    updates: int | None = None
    planned_after: int = 0
    seconds: float = 0.0

    def scheduled(self, step: int, *, per_update: int, most: int) -> float:
        """Return an optimizer step's position in a schedule over `most` updates, both from 0.

        Before the plan is made the position is the step itself. Afterwards the schedule runs faster, so that it ends
        with the last planned update.

        Args:
            step: number of the optimizer step in the run.
            per_update: optimizer steps per update.
            most: number of updates that the schedule is made for.
        """
        if self.updates is None or self.updates <= self.planned_after:
            return step
        first = self.planned_after * per_update
        rate = (most - self.planned_after) / (self.updates - self.planned_after)
        return step if step < first else first + (step - first) * rate


@dataclass
class Budget:
    """Time budget of a run over all its sittings. A sitting is one process of a run that may be resumed.

    Args:
        folder: the run folder.
        seconds: time for the whole run.
        most: largest number of updates.
        clock: returns seconds since any origin.
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
        """Load the plan and the spent time of an earlier sitting, if there are any."""
        file = self.folder / BUDGET
        if file.is_file():
            self.plan = TimePlan(**json.loads(file.read_text(encoding="utf-8")))
            self._earlier = self.plan.seconds

    @property
    def spent(self) -> float:
        """Seconds of this sitting, and of earlier sittings until they last saved the plan."""
        return self._earlier + self.clock() - self._started

    def plan_images(self, images: int, *, seconds_per_image: float) -> None:
        """Plan which fraction of an evaluation's `images` is sampled, before and after training."""
        fits = self.seconds * EVALUATION_SHARE / (2 * max(seconds_per_image, 1e-9))
        self._decide(images=min(1.0, fits / images))

    def measure_evaluation(self, seconds: float) -> None:
        """Reserve as much time for the evaluation after training as the one before it took."""
        self._decide(evaluation_seconds=seconds)

    def finish_update(self, update: int) -> bool:
        """Record the end of an update. Plan the number of updates once enough are measured.

        Returns:
            True if the number of updates was planned by this call.
        """
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
        """Save the plan and the spent time in the run folder."""
        self.plan = replace(self.plan, seconds=self.spent)
        write_text(self.folder / BUDGET, json.dumps(asdict(self.plan), indent=1))

    def _decide(self, **values: float) -> None:
        self.plan = replace(self.plan, **values)  # type: ignore[arg-type]
