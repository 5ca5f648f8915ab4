"""What every loop that trains a LoRA has: adapters, optimizer, progress, checkpoints, a step on summed gradients."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import nn

from diffalign import lora
from diffalign.config import AnyRunConfig, EvaluationConfig, OptimizerConfig
from diffalign.core import console, processes
from diffalign.core.errors import UserError
from diffalign.pipelines.base import TextToImageModel
from diffalign.training import checkpoint
from diffalign.training.budget import TimePlan
from diffalign.training.cost import ForwardCounter
from diffalign.training.denoise import image_size
from diffalign.training.inputs import Inputs
from diffalign.training.run_folder import RunFolder
from diffalign.training.sums import Sums


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says since when and from where it can be resumed."""


@dataclass
class Progress:
    """What outlives a process: finished updates, optimizer steps, seconds of training, and how often the run was rolled
    back: each time halves the learning rate."""

    update: int = 0
    step: int = 0
    seconds: float = 0.0
    rollbacks: int = 0


@dataclass
class Trainer(ABC):
    """One run of one loop; a subclass says what an update is."""

    config: AnyRunConfig
    model: TextToImageModel
    accelerator: Accelerator
    folder: RunFolder
    progress: Progress = field(default_factory=Progress, kw_only=True)
    time_plan: TimePlan = field(default=TimePlan(), kw_only=True)
    """Number of updates that fit into `training.total_minutes`, once that is known."""

    policies: ClassVar[tuple[str, ...]] = (lora.AVERAGED,)
    """Adapters besides the current one; all are in a checkpoint."""
    forwards: ForwardCounter = field(init=False)
    advice: ClassVar[str] = ""
    """What else helps against a gradient that is not finite."""

    @classmethod
    def of_run(
        cls,
        config: AnyRunConfig,
        model: TextToImageModel,
        accelerator: Accelerator,
        folder: RunFolder,
        inputs: Inputs,
    ) -> Trainer:
        """Return the trainer of a run; a method that needs prompts or rewards takes them from `inputs`."""
        return cls(config, model, accelerator, folder)

    def __post_init__(self) -> None:
        c = self.config
        self.size = image_size(c, self.model)
        self.model.latent_shape(*self.size)  # a clear error now rather than at the first images
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
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=c.optimizer.learning_rate,
            betas=c.optimizer.betas,
            weight_decay=c.optimizer.weight_decay,
            eps=c.optimizer.epsilon,
        )

    def prepare(self) -> None:  # noqa: B027
        """Whatever takes long and comes before the first update; it goes on where it was interrupted."""

    @abstractmethod
    def train_update(self) -> dict[str, Any]:
        """One update; returns the row of the log, with its number as `update`."""

    @abstractmethod
    def full_batches(self) -> dict[bool, set[int]]:
        """Rows of the denoiser's full batches, with gradient (True) and without: what is worth compiling for."""

    def validate(self) -> dict[str, float]:
        """What an evaluation holds besides scores of images."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What the summary says besides."""
        return {}

    def headline(self, row: dict[str, Any]) -> dict[str, str]:
        """What of a row the progress bar shows."""
        return {}

    def say(self, text: str) -> None:
        """Print a line beside the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            console.say(text)

    def watch(self, log: list[dict[str, Any]], before: Mapping[str, float]) -> Any:
        """Look for what is wrong after an update, and note warnings in the log's last row.

        Returns what `answer` is to be told, or None.

        Args:
            before: means of the evaluation before training.
        """
        return None

    def answer(self, finding: Any) -> None:  # noqa: B027
        """Do what the configuration wants about what `watch` has found; the update is logged and saved by then.

        Raises:
            TrainingError: the run is to end.
        """

    def ended(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        """Return why training ends before its planned updates, or None."""
        return None

    @property
    def policy(self) -> str:
        """The policy that is evaluated and saved."""
        return lora.AVERAGED if self.config.training.ema_max else lora.CURRENT

    def drawing(self, policy: str) -> AbstractContextManager[None]:
        """The context in which images of a policy are made."""
        context = lora.merged if self.config.drawing.merge_lora else lora.policy
        return context(self.model.denoiser, policy)

    def drawn_model(self, policy: str) -> TextToImageModel:
        """The model that draws as a policy."""
        return self.model

    def evaluation(self, policy: str) -> EvaluationConfig:
        """How a policy draws held-out prompts."""
        return self.config.evaluation

    def export(self, folder: Path) -> None:
        """Write what a user takes away; the LoRA of the policy that is evaluated, as `lora/`."""
        lora.export_lora(
            self.model.denoiser, self.model.pipeline, folder / "lora", name=self.policy
        )

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.training.num_updates

    def step(self, number: int, *, index: int) -> float:
        """Sum the gradients of all processes and apply them; returns their norm before clipping. `index` is that of the
        optimizer step in the run, from 0.

        Raises:
            TrainingError: the gradient is not finite; it is not applied.
        """
        norm = self._reduce_gradients()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of update {number} is not finite and was not applied; the last checkpoint is "
                f"{checkpoint.latest(self.folder.checkpoints) or 'none'}. The same command would meet it again: "
                f"start{' in another output_dir' if self.folder.begun else ''} with a lower "
                f"optimizer.learning_rate{self.advice}"
            )
        most = self.config.training.num_updates
        per_update = self.planned_steps // most
        scheduled = self.time_plan.scheduled(index, per_update=per_update, most=most)
        factor = lr_factor(scheduled, self.config.optimizer, total=self.planned_steps)
        factor *= 0.5**self.progress.rollbacks
        self.optimizer.param_groups[0]["lr"] = self.config.optimizer.learning_rate * factor
        self.optimizer.step()
        self.progress.step += 1
        done = self.progress.step
        decay = min(self.config.training.ema_max, (1 + done) / (10 + done))
        lora.blend(self.model.denoiser, lora.AVERAGED, decay=decay)
        return norm

    def finish(
        self, number: int, sums: Sums, *, started: float, count: int, unit: str
    ) -> dict[str, Any]:
        """The optimizer step of an update whose gradients are there, and its row of the log.

        Args:
            started: of the update, by `time.perf_counter`.
            count: pairs or images of all processes together; `unit` says which, "pair" or "image".
        """
        sums.table = self.accelerator.reduce(sums.table, "sum")
        norm = self.step(number, index=number - 1)
        self.optimizer.zero_grad()
        self.progress.update = number
        forwards = torch.tensor(self.forwards.take(), device=self.accelerator.device)
        seconds = time.perf_counter() - started
        self.progress.seconds += seconds
        return {
            "update": number,
            "step": self.progress.step,
            "grad_norm": norm,
            **sums.means(),
            f"forwards_per_{unit}": self.accelerator.reduce(forwards, "sum").item() / count,
            "seconds": self.progress.seconds,
            "update_seconds": seconds,
            f"{unit}s_per_second": count / seconds,
        }

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint of the run folder, if there is one.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        path = processes.on_main(lambda: checkpoint.load_newest(self.folder.checkpoints))
        if path is None:
            if self.accelerator.is_main_process:
                self.folder.rewind_log(0)
            return False
        self._load(path)
        return True

    def roll_back(self, good: int) -> None:
        """Return to the newest checkpoint that is no later than update `good`, drop later ones, halve the rate.

        Raises:
            TrainingError: there is none.
            CheckpointError: there are some, and all are damaged.
        """
        path = processes.on_main(
            lambda: checkpoint.load_newest(self.folder.checkpoints, until=good)
        )
        if path is None:
            raise TrainingError(
                f"no checkpoint of update {good} or before it is left to roll back to: keep more of them "
                "(training.keep_checkpoints) or write them more often (training.checkpoint_every)"
            )
        rollbacks, seconds = self.progress.rollbacks + 1, self.progress.seconds
        self._load(path)
        self.progress.rollbacks, self.progress.seconds = rollbacks, seconds
        if self.accelerator.is_main_process:
            checkpoint.drop_after(path)
        self.accelerator.wait_for_everyone()
        self.save()  # an interruption must not undo the rollback

    def _load(self, path: Path) -> None:
        update, tensors, state = checkpoint.load(path)
        for name in (lora.CURRENT, *self.policies):
            lora.load_adapter_state(self.model.denoiser, name, tensors[name])
        checkpoint.restore_optimizer(self.optimizer, tensors["optimizer"])
        self.progress = Progress(update, **state)
        if self.accelerator.is_main_process:
            self.folder.rewind_log(update)

    def save(self) -> None:
        """Write a checkpoint (main process only; every process holds the same state)."""
        if self.accelerator.is_main_process:
            tensors = {
                name: lora.adapter_state(self.model.denoiser, name)
                for name in (lora.CURRENT, *self.policies)
            }
            tensors["optimizer"] = checkpoint.optimizer_tensors(self.optimizer)
            checkpoint.save(
                self.folder.checkpoints,
                self.progress.update,
                tensors,
                {
                    "step": self.progress.step,
                    "seconds": self.progress.seconds,
                    "rollbacks": self.progress.rollbacks,
                },
                keep=self.config.training.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _reduce_gradients(self) -> float:
        """Sum over processes, clip, return the norm before clipping."""
        for parameter in self.parameters:
            if parameter.grad is None:  # a process without images still takes part
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(parameter.grad)
        return nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm).item()


def lr_factor(step: float, config: OptimizerConfig, *, total: int) -> float:
    """Share of the learning rate at optimizer step `step` (from 0) of `total`: a function of nothing else, so that a
    resumed run needs no state of a scheduler."""
    warmup = config.warmup_updates
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.lr_scheduler == "linear":
        return 1 - done
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
