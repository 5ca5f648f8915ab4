"""Apply a run's time budget to its updates and evaluations, the same in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffalign import lora
from diffalign.config import AnyRunConfig, EvaluationConfig
from diffalign.data.prompts import Prompt
from diffalign.evaluation.score import repeat_prompts
from diffalign.training.budget import Budget
from diffalign.training.trainer import Trainer


def budget_of(config: AnyRunConfig) -> Budget | None:
    """Return the time budget of a run, whose clock starts now. Return None without `total_minutes`."""
    c = config.training
    if c.total_minutes is None:
        return None
    return Budget(Path(config.output_dir), 60 * c.total_minutes, c.num_updates)


@dataclass
class Pace:
    """Pace of a run that follows the plan of a time budget.

    Without a budget, all numbers are as configured.
    """

    trainer: Trainer
    accelerator: Accelerator
    budget: Budget | None

    def __post_init__(self) -> None:
        if self.budget is not None:
            self.budget.resume()

    @property
    def updates(self) -> int:
        """Number of updates of the whole run: the planned one, else the configured one."""
        return self.trainer.time_plan.updates or self.trainer.config.training.num_updates

    def evaluation(self, policy: str) -> EvaluationConfig:
        """Return the sampling settings of a policy's evaluations.

        If time is short, they have fewer images per prompt (or per task) than configured.
        """
        how, images = self.trainer.evaluation(policy), self.trainer.time_plan.images
        if images is None or images >= 1:
            return how
        name = "images_per_prompt" if how.images_per_task is None else "images_per_task"
        fewer: dict[str, Any] = {name: max(1, int(getattr(how, name) * images))}
        return replace(how, **fewer)

    def plan_evaluations(
        self, prompts: Sequence[Prompt], draw: Callable[[Sequence[Prompt]], None]
    ) -> None:
        """Plan how many images of an evaluation fit.

        The duration of an image is measured on the second of two micro-batches, because the first compiles.

        Args:
            prompts: held-out prompts.
            draw: samples and scores one image for each of some prompts.
        """
        if self.budget is None:
            return
        every = repeat_prompts(prompts, self.trainer.evaluation(lora.REFERENCE))
        if self.budget.plan.images is None:
            few = every[: self.trainer.config.drawing.micro_batch_size]
            draw(few)
            started = self.budget.clock()
            draw(few)
            each = (self.budget.clock() - started) / len(few)
            self.budget.plan_images(len(every), seconds_per_image=each)
        self._share()
        if (self.budget.plan.images or 1) < 1:
            self.trainer.say(
                f"training.total_minutes: evaluations draw {self.budget.plan.images:.0%} of their images"
            )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure the evaluation before training, to reserve as much time for the one after it."""
        started = self.budget.clock() if self.budget is not None else 0.0
        yield
        if self.budget is not None:
            self.budget.measure_evaluation(self.budget.clock() - started)
            self.save()

    def finish_update(self, update: int) -> None:
        """Plan how many updates fit once the first are measured, and save the plan."""
        # true after the same update in every process: updates are counted, not timed
        if self.budget is None or not self.budget.finish_update(update):
            return
        self._share()
        self.save()
        most = self.trainer.config.training.num_updates
        self.trainer.say(f"training.total_minutes: {self.updates} of {most} updates are planned")

    def save(self) -> None:
        """Save the plan and the spent time, in the main process."""
        if self.budget is not None and self.accelerator.is_main_process:
            self.budget.save()

    def _share(self) -> None:
        """Send the main process's plan to all processes. Clocks differ, and its clock decides."""
        assert self.budget is not None
        self.budget.plan = broadcast_object_list([self.budget.plan])[0]
        self.trainer.time_plan = self.budget.plan
