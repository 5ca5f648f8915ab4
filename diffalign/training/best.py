"""Keep the best policy of a run by its held-out rewards, beside the last one.

A trained reward can rise while images become worse. The best policy is therefore that of the evaluation with the
highest gain in rewards that are not trained on. Its checkpoint and its LoRA lie in `best/` of the run folder, where no
limit of checkpoints deletes them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from diffalign.config import AnyRunConfig
from diffalign.core.files import write_text
from diffalign.evaluation.score import Evaluation
from diffalign.training import checkpoint
from diffalign.training.run_folder import BEST_RECORD
from diffalign.training.trainer import Trainer


@dataclass(frozen=True)
class Best:
    """Evaluation with the highest gain in held-out rewards so far.

    Attributes:
        update: number of the update that was evaluated; 0 for the base model.
        by: names of the held-out rewards.
        gain: mean over these rewards of the gain over the base model, in standard deviations of the base's images.
        means: means of all rewards in this evaluation.
        tasks: accuracy of each task, where a reward says what is correct.
    """

    update: int
    by: tuple[str, ...]
    gain: float
    means: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)


def held_out_names(config: AnyRunConfig) -> tuple[str, ...]:
    """Return the columns of an evaluation with rewards that are not trained on."""
    own = () if config.trains_on_rewards else ("reward",)
    return (*own, *config.evaluation.rewards)


def gain(evaluation: Evaluation, before: Evaluation, names: tuple[str, ...]) -> float | None:
    """Return the mean gain of rewards over the base model.

    Each gain is in standard deviations of the base model's images. Rewards that are constant on these images are left
    out. Return None if a reward scored no image, or if all are constant.
    """
    gains = []
    for name in names:
        scores = before.scores.get(name)
        now, first = (e.means.get(name, math.nan) for e in (evaluation, before))
        if scores is None or not math.isfinite(now - first):
            return None
        spread = float(np.nanstd(scores))
        if spread > 0:
            gains.append((now - first) / spread)
    return sum(gains) / len(gains) if gains else None


class BestKeeper:
    """Keeper of the best policy of a run by its held-out rewards.

    Args:
        trainer: trainer of the run.
        before: evaluation of the base model.
    """

    def __init__(self, trainer: Trainer, before: Evaluation) -> None:
        self.trainer, self.before = trainer, before
        self.names = held_out_names(trainer.config) if trainer.keeps_best else ()
        self.best: Best | None = None
        # without a held-out reward of the base's images nothing can be compared
        if not self.names or gain(before, before, self.names) is None:
            return
        record = trainer.folder.read_best()
        if record is not None:
            self.best = Best(**record)
            return
        self.best = Best(0, self.names, 0.0, before.means, before.tasks)
        if trainer.rolls_back and trainer.progress.update == 0:
            self._save(export=False)

    def consider(self, evaluation: Evaluation) -> None:
        """Keep the evaluated policy if its held-out rewards are the best so far. All processes call it."""
        if self.best is None:
            return
        value = gain(evaluation, self.before, self.names)
        if value is None or value <= self.best.gain:
            return
        update = self.trainer.progress.update
        self.best = Best(update, self.names, value, evaluation.means, evaluation.tasks)
        self._save(export=True)

    def summary(self) -> dict[str, Any] | None:
        """Return the figures of the best evaluation for the summary, None without held-out rewards."""
        return None if self.best is None else asdict(self.best)

    def _save(self, *, export: bool) -> None:
        folder = self.trainer.folder.best
        self.trainer.save(folder)
        if self.trainer.accelerator.is_main_process:
            assert self.best is not None
            path = folder / f"{self.best.update:06d}"
            if export:
                self.trainer.export(folder)
            write_text(folder / BEST_RECORD, json.dumps(asdict(self.best), indent=1), durable=True)
            checkpoint.keep_only(path)
        self.trainer.accelerator.wait_for_everyone()
