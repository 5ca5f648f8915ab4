"""Train a policy online: rollout, rewards, advantages, update.

The loop runs with any model, any reward and any number of processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch

from diffalign import lora
from diffalign.algorithms import advantages as adv
from diffalign.algorithms.forward_process import ForwardLoss
from diffalign.config import RunConfig, methods
from diffalign.core import processes
from diffalign.core.errors import UsageError
from diffalign.core.text import RANK
from diffalign.data.prompts import Prompt
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.evaluation.score import Score
from diffalign.evaluation.scoring import RewardTimeout
from diffalign.methods.online.forward_update import ForwardProcessUpdate
from diffalign.methods.online.hacking import Hacking, find_hacking, find_unscored
from diffalign.methods.online.health import (
    Collapse,
    Idle,
    find_collapse,
    find_idle,
    find_warnings,
)
from diffalign.methods.online.rollout import RolloutMaker, reward_row
from diffalign.methods.online.states import differences, partners
from diffalign.methods.online.trajectory_update import TrajectoryUpdate
from diffalign.methods.online.update import PolicyUpdate, TrainingBatch, UpdateSettings
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.training.inputs import Inputs
from diffalign.training.plan import Plan, check_prompts, check_share, make_plan, share
from diffalign.training.trainer import Trainer, TrainingError
from diffalign.types import Rollout

logger = logging.getLogger(__name__)
COLLAPSE, HACKING = "collapse", "hacking"
"""Keys of a collapse and of reward hacking among the `warnings` of a log row."""
KL_RAISE, MOST_KL_RAISES = 4.0, 4
"""Factor of a raised distance to the reference, and the largest number of raises."""
MOST_ROLLBACKS = 4
"""Number of rollbacks after which hacking ends the training."""


@dataclass
class OnlineTrainer(Trainer):
    """Trainer of online runs.

    Args:
        score: maps images, prompts and metadata to rewards; it never sees the model.
        prompts: prompts to train on.
        by_group: whether a reward compares the images of a prompt with each other.
    """

    config: RunConfig
    score: Score
    prompts: Sequence[Prompt]
    by_group: bool = field(default=False, kw_only=True)

    advice: ClassVar[str] = " or a higher algorithm.kl_beta"
    keeps_best: ClassVar[bool] = True

    @classmethod
    def policies_of(cls, config: RunConfig) -> tuple[str, ...]:
        own = getattr(methods.loss(config.algorithm.type), "own_sampler", False)
        return (lora.LAGGED, lora.AVERAGED, *([lora.SAMPLER] if own else []))

    @classmethod
    def taken_from(cls, inputs: Inputs) -> dict[str, Any]:
        reward = inputs.reward
        return {"score": reward.score, "prompts": inputs.train, "by_group": reward.by_group}

    def __post_init__(self) -> None:
        c = self.config
        if not isinstance(self.model.noise, RectifiedFlow):
            raise UsageError(
                f"algorithm.type: {c.algorithm.type} trains rectified flows (SD3, FLUX, SANA), but {c.model.name} is a "
                f"{self.model.family} model. Use a recipe for that family"
            )
        super().__post_init__()
        check_share(
            c.rollout.images_per_update,
            self.accelerator.num_processes,
            setting="rollout.prompts_per_update x rollout.group_size",
        )
        paired = getattr(methods.loss(c.algorithm.type), "paired", False)
        # images that are compared as such must lie in one process
        together = c.rollout.group_size if self.by_group else 2 if paired else 1
        world, count = self.accelerator.num_processes, c.rollout.images_per_update
        if any(share(count, rank, world).start % together for rank in range(world)):
            raise UsageError(
                f"rollout.prompts_per_update={c.rollout.prompts_per_update}: a reward or loss compares images of a "
                f"prompt, which one of the {world} processes must have all. Choose a multiple of {world}"
            )
        check_prompts(self.prompts, c)
        self.rollouts = RolloutMaker(
            c, self.model, self.score, self.accelerator, self.size, self.drawing, self.by_group
        )
        self.policy_update = self._policy_update()

    def _policy_update(self) -> PolicyUpdate:
        """Return the policy update of the configured algorithm."""
        c = self.config
        scheduler = self.model.scheduler_at(c.rollout.num_inference_steps, self.size)
        reference_guidance = c.algorithm.reference_guidance_scale
        guided = self.model.costs_a_forward(reference_guidance)
        if reference_guidance is not None and not (guided or self.model.guidance_is_embedded):
            raise UsageError(
                f"algorithm.reference_guidance_scale={reference_guidance}: {c.model.name} does not support guidance. "
                "Remove the setting"
            )
        settings = UpdateSettings(
            grid=scheduler.timesteps,
            sigmas=scheduler.sigmas,
            guidance_scale=c.rollout.guidance_scale,
            micro_batch_size=c.training.micro_batch_size,
            mixed_precision=c.training.mixed_precision,
            seed=c.training.seed,
            updates_per_rollout=c.training.updates_per_rollout,
            negative_embeds=self.rollouts.sampler.embed([""]) if guided else None,
            sum_processes=lambda table: self.accelerator.reduce(table, "sum"),
        )
        loss = methods.loss(c.algorithm.type)
        # the registry gives each loss the settings that it reads
        algorithm: Any = c.algorithm
        update = ForwardProcessUpdate if type(loss) is ForwardLoss else TrajectoryUpdate
        return update(self.model, algorithm, settings, loss)

    def full_batches(self) -> CompiledSizes:
        c, world = self.config, self.accelerator.num_processes
        share = -(-c.rollout.images_per_update // world)
        trained = self.policy_update.sizes(min(c.training.micro_batch_size, share))
        sampled = min(c.rollout.micro_batch_size, share)
        drawing = {
            self.model.forward_rows(sampled, c.rollout.guidance_scale),
            self.model.forward_rows(c.rollout.micro_batch_size, c.evaluation.guidance_scale),
        }
        return trained | CompiledSizes(without=drawing)

    @property
    def planned_steps(self) -> int:
        return self.config.training.num_updates * self.config.training.updates_per_rollout

    def facts(self) -> dict[str, Any]:
        return {"rollbacks": self.progress.rollbacks, "kl_raises": self.progress.kl_raises}

    @property
    def rolls_back(self) -> bool:
        return self.config.training.on_hacking == "rollback"

    def headline(self, row: dict[str, Any]) -> dict[str, str]:
        return {
            "reward": f"{row['reward']:.3f}",
            "kl": f"{row.get('kl', 0):.4f}",
            "images_per_s": f"{row['images_per_second']:.1f}",
        }

    def learn(self, number: int) -> tuple[int, dict[str, Any]]:
        """Sample one rollout and train on it.

        The log's `rollout_seconds` is the time until the rollout has its rewards.
        """
        started = time.perf_counter()
        plan = self.plan(number)
        rollout = self.rollout(plan, number)
        if not rollout.rewards.isfinite().any():
            self._end_without_rewards(rollout, number)
        rollout_seconds = time.perf_counter() - started
        batch, row = self.make_batch(plan, rollout)
        row["diversity"] = self._diversity(rollout)
        self.policy_update.kl_factor = KL_RAISE**self.progress.kl_raises
        if self.progress.kl_raises:
            row["kl_factor"] = self.policy_update.kl_factor
        if batch.trained == 0:
            logger.warning("update %d: no group has different rewards; nothing to learn", number)
        else:
            row |= self.optimize(batch, number)
        return len(plan), row | {"rollout_seconds": rollout_seconds}

    def _end_without_rewards(self, rollout: Rollout, number: int) -> NoReturn:
        """Raise TrainingError for an update without a reward.

        The run is saved if its images are finite.
        """
        if not processes.highest(int(rollout.latents.isfinite().any())):
            raise TrainingError(
                f"update {number}: the policy draws no finite image any more, and its weights were not saved; the "
                f"last checkpoint is {self.folder.newest_checkpoint or 'none'}. Start again in another output_dir "
                f"with a lower optimizer.learning_rate{self.advice}"
            )
        self.save()
        raise TrainingError(
            f"update {number}: no image could be scored, see the warnings above; everything up to update "
            f"{self.progress.update} is saved, and the same command resumes from there"
        )

    def watch(
        self, log: list[dict[str, Any]], before: Mapping[str, Any]
    ) -> Collapse | Hacking | Idle | None:
        """Look for a collapse, for reward hacking, and for updates without a signal.

        Each warning is printed once and stored in the last log row. After a collapse that was only warned of, later
        rows are compared with each other alone. A policy that has learnt everything is no fault; `ended` reports it.

        Returns:
            The finding that `answer` reacts to, or None.
        """
        held_out = self.config.evaluation.rewards
        warnings = find_warnings(log) | find_unscored(log, before, held_out)
        noted = [row.get("warnings", {}) for row in log]
        earlier = {about for texts in noted for about in texts}
        since = max((i + 1 for i, texts in enumerate(noted) if COLLAPSE in texts), default=0)
        new = {about: text for about, text in warnings.items() if about not in earlier}
        for text in new.values():
            self.say(f"warning: {text}")
        # rewards that only compare images have no column of their own
        means = before.get("means", {})
        trained = any(name.removeprefix(RANK) in means for name in self.config.rewards)
        collapse = find_collapse(log[since:])
        hacking = find_hacking(log, before, held_out, trained=trained)
        new |= {
            about: str(finding)
            for about, finding in ((COLLAPSE, collapse), (HACKING, hacking))
            if finding is not None
        }
        if new:
            log[-1]["warnings"] = new
        idle = find_idle(log, self.config.training.max_idle_updates)
        return collapse or hacking or (idle if idle is not None and not idle.learnt else None)

    def answer(self, finding: Collapse | Hacking | Idle) -> None:
        if isinstance(finding, Idle):
            self.save()
            raise TrainingError(f"{finding}. The run is saved at update {finding.update}")
        if isinstance(finding, Hacking):
            self._answer_hacking(finding)
            return
        reaction = self.config.training.on_collapse
        if reaction == "stop":
            raise TrainingError(f"{finding}; stopped, every checkpoint is kept")
        self.say(f"warning: {finding}")
        if reaction == "rollback":
            self.roll_back(finding.good)
            self._say_rollback()

    def _answer_hacking(self, finding: Hacking) -> None:
        """React to reward hacking as configured. `ended` reports a run that ends for it."""
        reaction, progress = self.config.training.on_hacking, self.progress
        self.say(f"warning: {finding}")
        if reaction == "rollback" and progress.rollbacks < MOST_ROLLBACKS:
            self.roll_back(finding.good, to_best=True)
            self._say_rollback()
        elif reaction == "raise_kl" and progress.kl_raises < MOST_KL_RAISES:
            progress.kl_raises += 1
            # an interruption must not undo the answer
            self.save()
            weight = self.config.algorithm.kl_beta * KL_RAISE**progress.kl_raises
            self.say(f"the weight of the distance to the reference is now {weight:g}")
        elif reaction in ("rollback", "stop"):
            self.save()

    def _say_rollback(self) -> None:
        self.say(
            f"rolled back to update {self.progress.update}, learning rate times {0.5**self.progress.rollbacks:g}"
        )

    def ended(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        # a run that was rolled back has dropped the row of the verdict
        if log and HACKING in log[-1].get("warnings", {}):
            reaction = self.config.training.on_hacking
            spent = reaction == "rollback" and self.progress.rollbacks >= MOST_ROLLBACKS
            if spent or reaction == "stop":
                return (
                    f"training ends after update {log[-1]['update']}, because the trained reward looks gamed "
                    "(training.on_hacking)"
                )
        idle = find_idle(log, self.config.training.max_idle_updates)
        return str(idle) if idle is not None and idle.learnt else None

    def plan(self, update: int) -> Plan:
        """Return the prompts and seeds that an update samples."""
        return make_plan(
            self.prompts,
            self.config.rollout,
            seed=self.config.training.seed,
            update=update,
            tasks=self.config.prompts,
        )

    def rollout(self, plan: Plan, update: int) -> Rollout:
        """Return this process's images, with the rewards of the whole update.

        Raises:
            TrainingError: a reward timed out. The updates before this one are saved.
        """
        try:
            return self.rollouts.make(plan, self.policy_update, update)
        except RewardTimeout as error:
            self.save()
            raise TrainingError(
                f"update {update}: {error}; everything up to update "
                f"{self.progress.update} is saved, and the same command resumes from there"
            ) from error

    def make_batch(self, plan: Plan, rollout: Rollout) -> tuple[TrainingBatch, dict[str, Any]]:
        """Return this process's training batch, and the figures of the rewards for the log.

        Advantages are computed over the whole update. The batch has only images that take part in the loss.
        """
        c = self.config.algorithm
        rewards, group = rollout.rewards, rollout.group
        if c.reward_mixing == "advantages":
            parts = {k: torch.from_numpy(rollout.details[k]) for k in self.config.rewards}
            advantages = adv.combined_advantages(
                parts, self.config.rewards, group, std_scope=c.std_scope
            )
        else:
            advantages = adv.group_advantages(rewards, group, std_scope=c.std_scope)
        valid = rewards.isfinite()
        if self.policy_update.paired:
            advantages, valid = differences(advantages, valid)
        keep = valid
        if self.config.training.drop_uninformative:
            keep = self.policy_update.takes_part(advantages.where(valid, torch.nan), group)
        mine = self.share(len(plan))
        local = torch.tensor([i for i in mine if keep[i]], dtype=torch.long)
        rows = local - mine.start
        batch = TrainingBatch(
            latents=rollout.latents[rows.to(rollout.latents.device)],
            embeds=rollout.embeds,
            prompt_index=rollout.prompt_index[rows],
            advantages=advantages[local],
            image=local.tolist(),
            total=max(int(valid.sum()), 1),
            trained=int(keep.sum()),
            trajectory=None if rollout.trajectory is None else rollout.trajectory[rows],
            partner=rollout.latents[partners(rows).to(rollout.latents.device)]
            if self.policy_update.paired
            else None,
        )
        batch = self.policy_update.begin_rollout(batch)
        return batch, reward_row(rewards, group, keep, rollout.details)

    def _diversity(self, rollout: Rollout) -> float:
        """Return the mean spread of latents within groups, over the images of all processes."""
        groups = len(rollout.group.unique())
        moments = adv.group_moments(rollout.latents.cpu(), rollout.prompt_index, groups=groups)
        if self.accelerator.num_processes > 1:
            moments = self.accelerator.reduce(moments.to(self.accelerator.device), "sum")
        return adv.group_diversity(moments)

    def optimize(self, batch: TrainingBatch, number: int) -> dict[str, float]:
        """Take all optimizer steps on one rollout, and return the means of their metrics."""
        c = self.config
        rows = []
        for inner in range(c.training.updates_per_rollout):
            self.optimizer.zero_grad()
            sums = self.policy_update.accumulate(batch, update=number, inner=inner)
            index = (number - 1) * c.training.updates_per_rollout + inner
            rows.append(self.descend(number, sums, index=index))
        for policy, decay in self.policy_update.decays(number).items():
            lora.blend(self.model.denoiser, policy, decay=decay)
        return {k: float(np.mean([r[k] for r in rows if k in r])) for k in rows[-1]}
