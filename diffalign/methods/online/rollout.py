"""Sample and score this process's share of an update's images.

An update is planned as a list of (prompt, seed) pairs, which depends only on the run's seed and the update's number.
The images are therefore the same for any number of processes and any micro-batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.config import (
    RunConfig,
)
from diffalign.data.prompts import Prompt
from diffalign.evaluation.score import Score
from diffalign.evaluation.scoring import BackgroundScorer, RewardTimeout
from diffalign.methods.online.states import PairedStates, first_of_pairs
from diffalign.methods.online.update import PolicyUpdate
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.recording import Recorder
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.sampling import Generators, Sampling
from diffalign.training.plan import Plan
from diffalign.types import RewardOutput, Rollout


class Submission:
    """Submission of a rollout's images to the scorer as they are drawn.

    Args:
        prompts: prompts of all images of this process.
        group_size: number of images of a prompt that are scored together, whatever the batches in which they are
            drawn; None to score each batch at once.
    """

    def __init__(
        self, scorer: BackgroundScorer, prompts: Sequence[Prompt], group_size: int | None
    ) -> None:
        self._scorer = scorer
        self._prompts = prompts
        self._group_size = group_size
        self._waiting: list[Tensor] = []

    def __call__(self, part: slice, images: Tensor) -> None:
        """Submit the groups that are whole with these images (B, 3, H, W).

        Args:
            part: numbers of the images within this process's share.
        """
        self._waiting.append(images)
        first, last = part.stop - sum(map(len, self._waiting)), part.stop
        if self._group_size is not None:
            last -= last % self._group_size
        if last <= first:
            return
        together = torch.cat(self._waiting) if len(self._waiting) > 1 else images
        self._waiting = [together[last - first :]] if last < part.stop else []
        # two groups of one prompt must not be compared, so that each group is scored on its own
        size = self._group_size or last - first
        for start in range(first, last, size):
            prompts = self._prompts[start : start + size]
            self._scorer.submit(
                together[start - first : start - first + size],
                [p.text for p in prompts],
                [p.metadata for p in prompts],
            )


@dataclass
class RolloutMaker:
    """Sampler and scorer of rollouts.

    Args:
        score: maps images, prompts and metadata to rewards.
        size: (height, width) in pixels.
        drawing: returns the context in which the denoiser samples as a policy, by the policy's name.
        by_group: score all images of a prompt together, because a reward compares them.
    """

    config: RunConfig
    model: TextToImageModel
    score: Score
    accelerator: Accelerator
    size: tuple[int, int]
    drawing: Callable[[str], AbstractContextManager[None]]
    by_group: bool = False

    def __post_init__(self) -> None:
        c = self.config.rollout
        drawing = Drawing(
            c.num_inference_steps,
            c.guidance_scale,
            self.size,
            c.solver,
            micro_batch_size=c.micro_batch_size,
            mixed_precision=self.config.training.mixed_precision,
        )
        self.sampler = Sampler(self.model, drawing)
        overlap = self.config.rollout.overlap_rewards
        self.scorer = BackgroundScorer(
            self.score,
            timeout=self.config.rollout.reward_timeout,
            overlap=self.accelerator.device.type != "cpu" if overlap is None else overlap,
        )

    def make(self, plan: Plan, policy_update: PolicyUpdate, update: int) -> Rollout:
        """Sample and score this process's images.

        The rollout has this process's latents, and the rewards of the whole update from all processes. An image that
        is not finite has the reward NaN.

        Raises:
            RewardTimeout: in all processes, if one of them got no reward in time.
        """
        mine = plan.shard(self.accelerator.process_index, self.accelerator.num_processes)
        embeds = self.sampler.embed([p.text for p in plan.prompts])
        index = plan.prompt_index[mine.start : mine.stop]
        step = policy_update.sampler(update)
        image_prompts = [plan.prompts[i] for i in index.tolist()]
        group_size = self.config.rollout.group_size if self.by_group else None
        own = slice(mine.start, mine.stop)
        seeds, start = plan.seeds[own], None
        if isinstance(step, PairedStates):
            paired, initial = step, first_of_pairs(plan.seeds)[own]
            seeds = paired.seeds(seeds)

            def start(batch: Sampling, generators: Generators, part: slice) -> Tensor:
                return paired.start(batch, generators, initial[part])

        with self.drawing(policy_update.rollout_policy):
            samples = self.sampler.images(
                [p.text for p in image_prompts],
                seeds,
                step=step.around(self.sampler.step()) if isinstance(step, Recorder) else step,
                on_images=Submission(self.scorer, image_prompts, group_size),
                start=start,
            )
        output = self._collect()
        nothing = np.full(len(index), np.nan, np.float32)
        names = {k for part in gather_object([list(output.details)]) for k in part}
        details = {k: self._gather(output.details.get(k, nothing), plan) for k in sorted(names)}
        broken = ~samples.finite.numpy()
        # a reward may return a finite score for pixels of latents that are not finite
        values = np.where(broken, np.nan, output.values)
        rewards = torch.from_numpy(self._gather(values, plan))
        trajectory = None if step is None else step.trajectory()
        return Rollout(
            samples.latents, embeds, index, plan.prompt_index, rewards, details, trajectory
        )

    def _collect(self) -> RewardOutput:
        """Return the rewards of this process's images; raise RewardTimeout in all processes together."""
        output, problem = None, None
        try:
            output = self.scorer.collect()
        except RewardTimeout as error:
            problem = str(error)
        problems = [p for p in gather_object([problem]) if p is not None]
        if output is None or problems:
            raise RewardTimeout(problems[0])
        return output

    def _gather(self, values: np.ndarray, plan: Plan) -> np.ndarray:
        """Return the float32 values of all images, gathered from every process's share."""
        world = self.accelerator.num_processes
        if world == 1:
            return np.asarray(values, np.float32)
        width = max(len(plan.shard(r, world)) for r in range(world))
        padded = torch.full((width,), torch.nan, device=self.accelerator.device)
        padded[: len(values)] = torch.as_tensor(values, dtype=torch.float32, device=padded.device)
        everything = self.accelerator.gather(padded).view(world, width).cpu().numpy()
        return np.concatenate([everything[r, : len(plan.shard(r, world))] for r in range(world)])


def reward_row(
    rewards: Tensor, group: Tensor, keep: Tensor, details: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return the rewards' figures for the log, means over all images.

    The figure `reward_group_std` is the mean over groups of the reward's standard deviation within the group.
    """
    valid = rewards.isfinite()
    spread = [
        float(rewards[valid & (group == g)].std(unbiased=False))
        for g in group.unique()
        if (valid & (group == g)).any()
    ]
    row = {
        "reward": float(rewards[valid].mean()) if valid.any() else float("nan"),
        "reward_group_std": float(np.mean(spread)) if spread else float("nan"),
        "failed_rewards": int((~valid).sum()),
        "kept": int(keep.sum()),
    }
    return row | {
        f"reward/{k}": float(np.nanmean(v)) for k, v in details.items() if np.isfinite(v).any()
    }
