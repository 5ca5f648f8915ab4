"""Execute a whole run: load the model, evaluate it, train it, evaluate it again, write the report."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffalign import lora
from diffalign.config import AnyRunConfig, to_dict
from diffalign.config.methods import trainer_class
from diffalign.core import console, processes
from diffalign.core.errors import explain, full_disk, out_of_memory
from diffalign.core.files import aside
from diffalign.core.fingerprint import of_pipeline
from diffalign.core.interruption import Interrupted, Interruption
from diffalign.data.prompts import Prompt
from diffalign.evaluation.kept import keep, kept
from diffalign.evaluation.pictures import image_grid
from diffalign.evaluation.preference import win_rate
from diffalign.evaluation.report import shown, write_report
from diffalign.evaluation.score import Evaluation, Score, evaluate_model, repeat_prompts
from diffalign.evaluation.scoring import BackgroundScorer
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import compile_blocks, compiling_seconds
from diffalign.rewards.base import RewardError
from diffalign.rewards.composition import CompositeReward
from diffalign.training import trackers
from diffalign.training.best import BestKeeper
from diffalign.training.denoise import base_digest, evaluation_drawing, prepare_model
from diffalign.training.inputs import Inputs, read_inputs, score_with
from diffalign.training.memory_advice import memory_advice
from diffalign.training.memory_auto import settled
from diffalign.training.optimizers import notice as optimizer_notice
from diffalign.training.pace import Pace, budget_of
from diffalign.training.run_folder import BEFORE, SUMMARY, RunFolder, RunFolderError
from diffalign.training.run_summary import summary_of
from diffalign.training.trainer import Trainer
from diffalign.types import RewardOutput, no_reward

logger = logging.getLogger(__name__)
GRID_IMAGES = 12


@dataclass
class Run:
    """Parts of one run, ready to start."""

    config: AnyRunConfig
    accelerator: Accelerator
    model: TextToImageModel
    reward: CompositeReward
    held_out_reward: CompositeReward
    eval_prompts: Sequence[Prompt]
    trainer: Trainer
    pace: Pace
    """Numbers of updates and images that fit into the run's time."""
    resumed_after: int = 0
    """Number of the last update of an earlier sitting, 0 without one."""
    compiled: bool = False
    """True once this sitting has made an update, which compiles the denoiser's blocks."""
    trained: bool = False
    """True once the last update is saved."""
    before: Evaluation = field(init=False)
    """Evaluation of the reference, which win rates compare with."""
    best: BestKeeper = field(init=False)
    """Keeper of the best policy by held-out rewards."""

    @classmethod
    def prepare(cls, config: AnyRunConfig, *, earlier: Inputs | None = None) -> Run:
        """Load and check everything that a run needs.

        Errors that a user can mend are raised here, before the first image is sampled.

        Args:
            earlier: inputs of the run, if they were read before.
        """
        budget = budget_of(config)
        # before the rewards, whose device the accelerator determines
        accelerator = trackers.make_accelerator(config)
        inputs = read_inputs(config, earlier=earlier)
        if accelerator.is_main_process:
            for notice in inputs.notices:
                console.say(f"note: {notice}")
        reward, watched = inputs.reward, inputs.watched
        folder = RunFolder(config.output_dir)
        folder.check(config, inputs.digests)
        for part in (reward, watched):
            part.prepare()
        note = optimizer_notice(config.optimizer, accelerator.device)
        if note is not None and accelerator.is_main_process:
            console.say(f"note: {note}")
        model = prepare_model(config, accelerator.device)
        digests = inputs.digests | base_digest(model)
        folder.check(config, digests)
        kind = trainer_class(config.algorithm.type)
        trainer: Trainer = kind.of_run(config, model, accelerator, folder, inputs)
        if config.model.compile and compile_blocks(trainer.model.denoiser, trainer.full_batches()):
            trainer.say(
                "compiling the denoiser's blocks, once for each size: the first images and the first update take longer"
            )
        # every process must have checked the folder before one writes to it
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.claim(config, digests)
        pace = Pace(trainer, accelerator, budget)
        return cls(config, accelerator, model, reward, watched, inputs.held_out, trainer, pace)

    def execute(self) -> dict[str, Any]:
        """Train to the end, export the policy, and return the content of `summary.json`."""
        started = time.perf_counter()
        self.trainer.prepare()
        if self.trainer.resume():
            self.resumed_after = self.trainer.progress.update
            self._say(f"resumed after update {self.resumed_after}")
        self.pace.plan_evaluations(self.eval_prompts, self._draw_some)
        self.before = self._reference()
        self.best = BestKeeper(self.trainer, self.before)
        self._train()
        after = self._scored(self.trainer.policy)
        self.best.consider(after)
        summary = summary_of(self, after, time.perf_counter() - started)
        if self.accelerator.is_main_process:
            self.trainer.export(self.trainer.folder.path)
            self.trainer.folder.write(SUMMARY, json.dumps(summary, indent=2))
            write_report(
                self.trainer.folder.path,
                config=self.config,
                summary=summary,
                log=self.trainer.folder.read_log(),
                prompts=self.eval_prompts,
                before=self.before,
                after=after,
            )
            self._say(f"report: {self.trainer.folder.path / 'report.html'}")
        self.accelerator.wait_for_everyone()
        return summary

    def _reference(self) -> Evaluation:
        """Evaluate the base model once per run, and cache the result for resumed runs.

        Only the images shown in the report are kept.
        """
        file = self.trainer.folder.path / BEFORE
        how = self.pace.evaluation(lora.REFERENCE)
        pipeline = self.trainer.drawn_model(lora.REFERENCE).pipeline
        weights = of_pipeline(pipeline)
        rewards = [self.reward, self.held_out_reward]
        prompts = repeat_prompts(self.eval_prompts, how)
        rows = shown(len(prompts))
        # The run folder guarantees that every other setting is unchanged.
        key = {
            "base": [weights, dict(pipeline.scheduler.config)],
            "drawn": [to_dict(how), self.trainer.size],
            "rewards": [[r.weights, [vars(x.card) for x in r.rewards.values()]] for r in rewards],
            "shown": rows,
        }
        # The main process decides for all, so that either all of them evaluate or none.
        main = self.accelerator.is_main_process
        cached = [kept(file, prompts, key=key) if main else None]
        evaluation: Evaluation | None = broadcast_object_list(cached)[0]
        if evaluation is not None:
            return evaluation
        self._say(f"scoring {self.config.model.name} before training")
        failures = self.failures
        with self.pace.evaluating():
            evaluation = self._scored(lora.REFERENCE).thinned(rows)
        # With failed rewards the result is not cached: a resumed run may be able to score these images.
        if main and self.failures == failures:
            keep(evaluation, file, key=key)
        return evaluation

    def _scored(self, policy: str) -> Evaluation:
        """Evaluate a policy before or after training.

        Raises:
            RewardError: no image has a reward.
        """
        evaluation = self._evaluate(policy)
        if evaluation.failed == len(evaluation.prompts):
            raise RewardError(
                f"no image can be scored: {self.reward.last_error or 'all rewards are NaN'}. Choose other "
                "rewards, or mend "
                "these"
            )
        return evaluation

    def _train(self) -> None:
        trainer, main = self.trainer, self.accelerator.is_main_process
        trackers.start(self.accelerator, self.config)
        log, before = trainer.folder.read_log(), self.before.to_dict()
        bar = console.progress(
            self.config.algorithm.type,
            self.pace.updates,
            unit="update",
            initial=trainer.progress.update,
        )
        last, number = self._ended(log), 0
        with bar, Interruption("the update in hand is finished and saved") as interruption:
            while not last and not number:
                row = trainer.train_update()
                self._announce_compilation()
                self.pace.finish_update(row["update"])
                bar.total = self.pace.updates
                log.append(row)
                last = self._ended(log)
                if not interruption.number:
                    with interruption.breaks_off():
                        self._look(row, last=last)
                finding = trainer.watch(log, before)
                trackers.log(self.accelerator, row)
                if main:
                    trainer.folder.append_log(row)
                number = processes.highest(interruption.number)
                every = self.config.training.checkpoint_every
                if trainer.progress.update % every == 0 or last or number:
                    trainer.save()
                    self.pace.save()
                bar.set_postfix(trainer.headline(row))
                bar.update()
                if finding is not None:
                    trainer.answer(finding)
                    bar.n = trainer.progress.update
                    # without the rows of updates that were rolled back
                    log = [r for r in log if r["update"] <= bar.n]
                    last = self._ended(log)
        trackers.finish(self.accelerator)
        self.trained = last
        if number:
            raise Interrupted(number, trainer.folder.saved(trained=self.trained))
        if reason := trainer.ended(log):
            self._say(reason)
        for name, count in self.failures.items():
            if count:
                self._say(f"reward {name} could not score {count} images; they were left out")

    def _announce_compilation(self) -> None:
        """Print how long compilation took, after the first update of a sitting."""
        seconds = compiling_seconds() if self.config.model.compile else 0.0
        if seconds >= 1 and not self.compiled:
            self._say(f"compiled in {seconds:.0f} s; the next updates take their usual time")
        self.compiled = True

    def _ended(self, log: Sequence[dict[str, Any]]) -> bool:
        """Return whether training ends: as planned, out of time, or with everything learnt."""
        planned = self.trainer.progress.update >= self.pace.updates
        return planned or self._out_of_time() or self.trainer.ended(log) is not None

    def _look(self, row: dict[str, Any], *, last: bool) -> None:
        """Evaluate the policy and save samples if they are due after an update.

        The last update is not evaluated here, because the evaluation after training follows.
        """
        c = self.config.training
        if c.eval_every and row["update"] % c.eval_every == 0 and not last:
            evaluation = self._evaluate(self.trainer.policy)
            self.best.consider(evaluation)
            row["evaluation"] = (
                evaluation.to_dict() | self.trainer.validate() | self.wins(evaluation)
            )
        main = self.accelerator.is_main_process
        if main and c.sample_every and row["update"] % c.sample_every == 0:
            self._save_grid(row["update"])

    def _out_of_time(self) -> bool:
        """Return whether `training.max_minutes` are over, by the clock of the main process for all processes."""
        limit = self.config.training.max_minutes
        if limit is None:
            return False
        return bool(broadcast_object_list([self.trainer.progress.seconds > 60 * limit])[0])

    def _draw_some(self, prompts: Sequence[Prompt]) -> None:
        """Sample and score one image of the base model for each of some prompts."""
        self._evaluate(lora.REFERENCE, prompts)

    def _evaluate(
        self, policy: str, prompts: Sequence[Prompt] | None = None, *, score: Score | None = None
    ) -> Evaluation:
        """Evaluate a policy on the held-out prompts, or with one image for each of `prompts`.

        Every process makes the whole evaluation, so that its images do not depend on the number of processes.

        Args:
            score: function that scores the images; None: the run's rewards.
        """
        how = self.pace.evaluation(policy)
        if prompts is not None:
            how = replace(how, images_per_prompt=1, images_per_task=None)
        score = score or BackgroundScorer(
            self._score, timeout=self.config.drawing.reward_timeout, overlap=False
        )
        with self.trainer.drawing(policy):
            return evaluate_model(
                self.trainer.drawn_model(policy),
                self.eval_prompts if prompts is None else prompts,
                score,
                evaluation_drawing(self.config, self.trainer.size, how),
            )

    @property
    def failures(self) -> dict[str, int]:
        """Number of images that each reward could not score, by the reward's name."""
        return {**self.reward.failures, **self.held_out_reward.failures}

    def _score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> RewardOutput:
        """Score images with the trained reward, and add the held-out rewards to the details."""
        return score_with(self.reward, self.held_out_reward)(images, prompts, metadata)

    def _save_grid(self, update: int) -> None:
        prompts = self.eval_prompts[:: max(1, len(self.eval_prompts) // GRID_IMAGES)][:GRID_IMAGES]
        evaluation = self._evaluate(self.trainer.policy, prompts, score=no_reward)
        folder = self.trainer.folder.path / "samples"
        folder.mkdir(exist_ok=True)
        grid = image_grid(evaluation.images, columns=6, captions=evaluation.texts)
        with aside(folder / f"{update:06d}.png") as file:
            grid.save(file)
        trackers.log_images(self.accelerator, evaluation.images, grid=grid, update=update)

    def wins(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return the share of images with a higher reward than the base model's.

        An image is compared with the base model's image from the same noise.
        """
        prompts = [p.text for p in evaluation.prompts]
        wins = win_rate(evaluation.rewards, self.before.rewards, prompts)
        return {"win_rate": None if wins is None else wins.to_dict()}

    def _say(self, text: str) -> None:
        self.trainer.say(text)


def run(
    config: AnyRunConfig, *, earlier: Inputs | None = None, choose_memory: bool = True
) -> dict[str, Any]:
    """Prepare and execute a run, with its folder locked.

    Args:
        earlier: inputs of the run, if they were read before.
        choose_memory: choose memory settings if the run asks for them; False if the caller did.

    Raises:
        RunFolderError: another process runs in the folder, the disk is full, or the memory is full.
        Interrupted: a signal ended the run. The message says at which update the same command continues.
    """
    folder, prepared = RunFolder(config.output_dir), None
    try:
        with processes.hold(folder.path):
            if choose_memory:
                config = settled(config)
            prepared = Run.prepare(config, earlier=earlier)
            try:
                return prepared.execute()
            finally:
                # only now the folder belongs to this run
                if prepared.accelerator.is_main_process:
                    with suppress(OSError):
                        console.write_messages(folder.path)
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Interrupted) and str(interrupt):
            raise
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        trained = prepared is not None and prepared.trained
        raise Interrupted(number, folder.saved(trained=trained)) from interrupt
    except Exception as error:
        text = None
        if out_of_memory(error):
            text = explain(error, memory=memory_advice(config))
        elif (full := full_disk(error)) is not None:
            good = folder.newest_checkpoint
            text = (
                f"{full}; the last good checkpoint in {config.output_dir} is {good.name if good else 'none'}. Free "
                "space, and the same command goes on from there"
            )
        if text is None:
            raise
        raise RunFolderError(text) from error
