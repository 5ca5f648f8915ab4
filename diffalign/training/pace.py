"""Pace of a run: how many updates and evaluated images fit into its time, the same in all processes."""

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
    """Return the budget of a run's time, whose clock starts now; None where time is not limited."""
    c = config.training
    if c.total_minutes is None:
        return None
    return Budget(Path(config.output_dir), 60 * c.total_minutes, c.num_updates)


@dataclass
class Pace:
    """Follow the plan of a budget; without one everything is as configured."""

    trainer: Trainer
    accelerator: Accelerator
    budget: Budget | None

    def __post_init__(self) -> None:
        if self.budget is not None:
            self.budget.resume()

    @property
    def updates(self) -> int:
        """Number of updates of the whole run, as far as it is known."""
        return self.trainer.time_plan.updates or self.trainer.config.training.num_updates

    def evaluation(self, policy: str) -> EvaluationConfig:
        """Return how a policy draws held-out prompts: as configured, with fewer images where time is short."""
        how, images = self.trainer.evaluation(policy), self.trainer.time_plan.images
        if images is None or images >= 1:
            return how
        name = "images_per_prompt" if how.images_per_task is None else "images_per_task"
        fewer: dict[str, Any] = {name: max(1, int(getattr(how, name) * images))}
        return replace(how, **fewer)

    def plan_evaluations(
        self, prompts: Sequence[Prompt], draw: Callable[[Sequence[Prompt]], None]
    ) -> None:
        """Decide how many images of an evaluation fit, from the second of two micro-batches; the first compiles."""
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
        """Measure the evaluation before training: the one after it takes as long."""
        started = self.budget.clock() if self.budget is not None else 0.0
        yield
        if self.budget is not None:
            self.budget.measure_evaluation(self.budget.clock() - started)
            self.save()

    def finish_update(self, update: int) -> None:
        """Decide how many updates fit, once the first are measured; the plan is written at once."""
        if self.budget is None:
            return
        planned = self.budget.finish_update(update)
        self._share()
        if planned:
            self.save()
            most = self.trainer.config.training.num_updates
            self.trainer.say(
                f"training.total_minutes: {self.updates} of {most} updates are planned"
            )

    def save(self) -> None:
        """Write the plan and the time that was spent."""
        if self.budget is not None and self.accelerator.is_main_process:
            self.budget.save()

    def _share(self) -> None:
        """Let every process follow the plan of the main one, whose clock decides."""
        assert self.budget is not None
        self.budget.plan = broadcast_object_list([self.budget.plan])[0]
        self.trainer.time_plan = self.budget.plan
