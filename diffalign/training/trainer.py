"""Base class of trainers, which all train a LoRA.

It has the adapters, the optimizer, progress, checkpoints and the step on summed gradients.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import nn

from diffalign import lora
from diffalign.config import AnyRunConfig, EvaluationConfig
from diffalign.core import console, processes
from diffalign.core.errors import UserError
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.training import checkpoint, optimizers
from diffalign.training.budget import TimePlan
from diffalign.training.cost import ForwardCounter
from diffalign.training.denoise import image_size
from diffalign.training.inputs import Inputs
from diffalign.training.learning_rate import lr_factor
from diffalign.training.plan import share
from diffalign.training.run_folder import RunFolder
from diffalign.training.sums import Sums


class TrainingError(UserError, RuntimeError):
    """Training that cannot continue. The message names the last checkpoint or update that is saved."""


@dataclass
class Progress:
    """Counters of a run, which checkpoints store.

    Attributes:
        update: number of finished updates.
        step: number of optimizer steps.
        seconds: seconds of training.
        rollbacks: number of rollbacks, each of which halves the learning rate.
        kl_raises: number of times that the weight of the distance to the reference was raised.
        gain: running mean of preference pairs' margins at beta = 1, for an automatic beta.
    """

    update: int = 0
    step: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    kl_raises: int = 0
    gain: float = 0.0


@dataclass
class Trainer(ABC):
    """Trainer of one run. A subclass defines what an update is."""

    config: AnyRunConfig
    model: TextToImageModel
    accelerator: Accelerator
    folder: RunFolder
    progress: Progress = field(default_factory=Progress, kw_only=True)
    time_plan: TimePlan = field(default=TimePlan(), kw_only=True)
    """Plan of the updates and images that fit into `training.total_minutes`."""

    forwards: ForwardCounter = field(init=False)
    advice: ClassVar[str] = ""
    """Further advice for errors about a gradient that is not finite."""
    unit: ClassVar[str] = "image"
    """Noun for what an update trains on: "image" or "pair"."""
    keeps_best: ClassVar[bool] = False
    """True if the best policy by held-out rewards is kept beside the last one."""

    @classmethod
    def of_run(
        cls,
        config: AnyRunConfig,
        model: TextToImageModel,
        accelerator: Accelerator,
        folder: RunFolder,
        inputs: Inputs,
    ) -> Trainer:
        """Return the trainer of a run."""
        return cls(config, model, accelerator, folder, **cls.taken_from(inputs))

    @classmethod
    def taken_from(cls, inputs: Inputs) -> dict[str, Any]:
        """Return the fields that the method's trainer takes from the inputs of a run."""
        return {}

    @classmethod
    def policies_of(cls, config: Any) -> tuple[str, ...]:
        """Return the names of a run's adapters besides the current one. A checkpoint has all of them."""
        return (lora.AVERAGED,)

    @classmethod
    def trained_model(cls, config: Any, model: TextToImageModel) -> TextToImageModel:
        """Return the model that a run trains, on the meta device.

        Args:
            config: settings of the run.
            model: the base model, on the meta device.
        """
        return model

    def __post_init__(self) -> None:
        c = self.config
        self.policies = self.policies_of(c)
        self.size = image_size(c, self.model)
        # called for its errors: they should come now rather than at the first image
        self.model.latent_shape(self.size)
        self.parameters = lora.attach(
            self.model.denoiser,
            rank=c.lora.rank,
            alpha=c.lora.alpha,
            targets=c.lora.targets or self.model.lora_targets,
            seed=c.training.seed,
            policies=self.policies,
        )
        if c.training.mixed_precision != "no":
            lora.keep_input_dtype(self.model.denoiser)
        self.forwards = ForwardCounter(self.model.denoiser)
        self.optimizer = optimizers.make_optimizer(c.optimizer, self.parameters)

    def prepare(self) -> None:  # noqa: B027
        """Do the long work that precedes the first update, or continue it after an interruption."""

    def train_update(self) -> dict[str, Any]:
        """Train one update, and return its row of the log, with its number as `update`."""
        started = time.perf_counter()
        number = self.progress.update + 1
        # forwards of an evaluation do not count for the update
        self.forwards.take()
        count, row = self.learn(number)
        self.progress.update = number
        forwards = torch.tensor(self.forwards.take(), device=self.accelerator.device)
        row[f"forwards_per_{self.unit}"] = self.accelerator.reduce(forwards, "sum").item() / count
        seconds = time.perf_counter() - started
        self.progress.seconds += seconds
        return {
            "update": number,
            "step": self.progress.step,
            **row,
            "seconds": self.progress.seconds,
            "update_seconds": seconds - row.get("rollout_seconds", 0.0),
            f"{self.unit}s_per_second": count / seconds,
        }

    @abstractmethod
    def learn(self, number: int) -> tuple[int, dict[str, Any]]:
        """Train one update.

        Args:
            number: number of the update, from 1.

        Returns:
            The number of images or pairs of the update over all processes, and its figures for the log.
        """

    def share(self, count: int) -> range:
        """Return the items, of `count` over all processes, that this process works on."""
        return share(count, self.accelerator.process_index, self.accelerator.num_processes)

    def descend(self, number: int, sums: Sums, *, index: int | None = None) -> dict[str, Any]:
        """Take an optimizer step on the summed gradients, and return the figures of the step.

        Args:
            number: number of the update.
            sums: this process's sums of metrics.
            index: number of the optimizer step in the run, from 0; None for one step per update.
        """
        sums.table = self.accelerator.reduce(sums.table, "sum")
        norm = self.step(number, index=number - 1 if index is None else index)
        self.optimizer.zero_grad()
        return {"grad_norm": norm, **sums.means()}

    @abstractmethod
    def full_batches(self) -> CompiledSizes:
        """Return the sizes of the denoiser's full batches."""

    def validate(self) -> dict[str, float]:
        """Return validation metrics, which an evaluation reports besides the scores of images."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return the method's own figures for the summary."""
        return {}

    def headline(self, row: dict[str, Any]) -> dict[str, str]:
        """Return the figures of a log row that the progress bar shows."""
        return {}

    def say(self, text: str) -> None:
        """Print a line beside the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            console.say(text)

    def watch(self, log: list[dict[str, Any]], before: Mapping[str, Any]) -> Any:
        """Look for faults of the run, and store warnings in the last log row.

        The method is called after every update.

        Args:
            log: rows of the log.
            before: evaluation before training, as in a row's `evaluation`.

        Returns:
            The finding that `answer` reacts to, or None.
        """
        return None

    def answer(self, finding: Any) -> None:  # noqa: B027
        """React to a finding of `watch` as configured.

        The update is logged before, and a checkpoint saved if one is due.

        Raises:
            TrainingError: the reaction is to end the run.
        """

    def ended(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the reason why training ends before its planned updates, or None."""
        return None

    @property
    def rolls_back(self) -> bool:
        """True if the run may return to the base model, which then needs a checkpoint."""
        return False

    @property
    def policy(self) -> str:
        """Name of the policy that is evaluated and exported."""
        return lora.AVERAGED if self.config.training.ema_max else lora.CURRENT

    def drawing(self, policy: str) -> AbstractContextManager[None]:
        """Return the context in which the denoiser samples as a policy."""
        context = lora.merged if self.config.drawing.merge_lora else lora.policy
        return context(self.model.denoiser, policy)

    def drawn_model(self, policy: str) -> TextToImageModel:
        """Return the model that samples images of a policy."""
        return self.model

    def evaluation(self, policy: str) -> EvaluationConfig:
        """Return the sampling settings of a policy's evaluations."""
        return self.config.evaluation

    def export(self, folder: Path) -> None:
        """Save the result of the run: the evaluated policy's LoRA, as `lora/`."""
        lora.export_lora(
            self.model.denoiser, self.model.pipeline, folder / "lora", name=self.policy
        )

    @property
    def planned_steps(self) -> int:
        """Number of optimizer steps of the whole run, as configured."""
        return self.config.training.num_updates

    def step(self, number: int, *, index: int) -> float:
        """Sum the gradients of all processes, and take an optimizer step.

        Args:
            number: number of the update, for errors.
            index: number of the optimizer step in the run, from 0.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            TrainingError: the gradient is not finite. It is not applied.
        """
        norm = self._reduce_gradients()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of update {number} is not finite and was not applied; the last checkpoint is "
                f"{checkpoint.latest(self.folder.checkpoints) or 'none'}. The same command will fail in the same way. "
                f"Start{' in another output_dir' if self.folder.begun else ''} with a lower "
                f"optimizer.learning_rate{self.advice}"
            )
        most = self.config.training.num_updates
        per_update = self.planned_steps // most
        scheduled = self.time_plan.scheduled(index, per_update=per_update, most=most)
        factor = lr_factor(scheduled, self.config.optimizer, total=self.planned_steps)
        factor *= 0.5**self.progress.rollbacks
        optimizers.take_step(self.optimizer, self.config.optimizer.learning_rate * factor)
        self.progress.step += 1
        done = self.progress.step
        decay = min(self.config.training.ema_max, (1 + done) / (10 + done))
        lora.blend(self.model.denoiser, lora.AVERAGED, decay=decay)
        return norm

    def resume(self) -> bool:
        """Load the newest undamaged checkpoint of the run folder, if there is one.

        Returns:
            True if a checkpoint was loaded.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        path = processes.on_main(lambda: checkpoint.load_newest(self.folder.checkpoints))
        if path is None:
            if self.accelerator.is_main_process:
                self.folder.rewind_log(0)
            return False
        self._load(path)
        return True

    def roll_back(self, good: int, *, to_best: bool = False) -> None:
        """Load the newest checkpoint of update `good` at most, and halve the learning rate.

        Later checkpoints are deleted. With `to_best` the best policy by held-out rewards is loaded if no such
        checkpoint is newer.

        Raises:
            TrainingError: there is no such checkpoint.
            CheckpointError: all such checkpoints are damaged.
        """
        path = processes.on_main(
            lambda: checkpoint.load_newest(self.folder.checkpoints, until=good)
        )
        if to_best:
            best = processes.on_main(lambda: checkpoint.load_newest(self.folder.best))
            if best is not None and (path is None or int(path.name) < int(best.name) <= good):
                path = best
        if path is None:
            raise TrainingError(
                f"no checkpoint of update {good} or before is left to roll back to. Keep more checkpoints "
                "(training.keep_checkpoints) or save them more often (training.checkpoint_every)"
            )
        rollbacks, seconds = self.progress.rollbacks + 1, self.progress.seconds
        self._load(path)
        self.progress.rollbacks, self.progress.seconds = rollbacks, seconds
        if self.accelerator.is_main_process:
            checkpoint.drop_after(self.folder.checkpoints / path.name)
        self.accelerator.wait_for_everyone()
        # an interruption must not undo the rollback
        self.save()

    def _load(self, path: Path) -> None:
        update, tensors, state = checkpoint.load(path)
        for name in (lora.CURRENT, *self.policies):
            lora.load_adapter_state(self.model.denoiser, name, tensors[name])
        optimizers.restore(self.optimizer, tensors["optimizer"])
        self.progress = Progress(update, **state)
        if self.accelerator.is_main_process:
            self.folder.rewind_log(update)

    def save(self, folder: Path | None = None) -> None:
        """Save a checkpoint in the main process. Every process has the same state.

        Args:
            folder: folder of checkpoints; None for the run's own, which deletes old ones.
        """
        if self.accelerator.is_main_process:
            tensors = {
                name: lora.adapter_state(self.model.denoiser, name)
                for name in (lora.CURRENT, *self.policies)
            }
            tensors["optimizer"] = optimizers.state_tensors(self.optimizer)
            state = asdict(self.progress)
            checkpoint.save(
                folder or self.folder.checkpoints,
                state.pop("update"),
                tensors,
                state,
                keep=self.config.training.keep_checkpoints if folder is None else sys.maxsize,
            )
        self.accelerator.wait_for_everyone()

    def _reduce_gradients(self) -> float:
        """Sum the gradients over processes, clip them, and return the norm before clipping."""
        for parameter in self.parameters:
            # a process without images must take part in the sum, too
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(parameter.grad)
        return nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm).item()
