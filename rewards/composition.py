"""Weighted sum of several normalised rewards.

A failed score is NaN and is counted; it is never a silent 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffalign.core.text import RANK
from diffalign.rewards import registry
from diffalign.rewards.base import Metadata, Reward, RewardError
from diffalign.rewards.function import as_reward, score_all
from diffalign.rewards.groups import GroupReward
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)


class CompositeReward:
    """Weighted sum of normalised rewards.

    The `details` of its output hold the normalised values of each reward under its name, the raw ones under "name/raw"
    if they differ, and its further details under "name/detail". An image that a reward failed to score is NaN in that
    reward and in the sum. So is an image without a prompt, if the reward needs one. The attribute `failures` counts
    them.
    """

    def __init__(self, rewards: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        """Combine rewards by name.

        Args:
            rewards: instances, classes, or functions of (images, prompts, metadata), see `function`.
            weights: weight of each reward.
        """
        self.rewards: dict[str, Reward] = {n: as_reward(r, name=n) for n, r in rewards.items()}
        self.weights = dict(weights)
        self.failures: dict[str, int] = dict.fromkeys(rewards, 0)
        self.last_error: str | None = None

    @classmethod
    def from_config(
        cls, weights: Mapping[str, float], *, setting: str = "rewards", by_group: bool = False
    ) -> CompositeReward:
        """Combine built-in and installed rewards by name.

        Args:
            weights: weight of each reward.
            setting: setting that names the rewards, for messages.
            by_group: allow rewards that compare the images of a prompt. Their caller scores whole groups.

        Raises:
            UnknownReward: a name is unknown; the message begins with `setting`.
            RewardError: a reward compares images, and `by_group` is false.
        """
        for name in weights:
            registry.check_name(name, setting=setting)
        rewards = {name: registry.create(name, setting=setting) for name in weights}
        for name, reward in rewards.items():
            if isinstance(reward, GroupReward) and not by_group:
                raise RewardError(
                    f"reward {name!r} compares the images of a prompt with each other, which only the rollouts of an "
                    "online run offer. Choose rewards that score single images",
                    setting=setting,
                )
        return cls(rewards, weights)

    @property
    def by_group(self) -> bool:
        """True if a reward compares the images of a prompt with each other."""
        return any(isinstance(reward, GroupReward) for reward in self.rewards.values())

    def pointwise(self) -> CompositeReward:
        """Return the rewards that score single images.

        A reward that ranks by another one is replaced by the other. Other rewards that compare images are left out.
        """
        rewards: dict[str, Reward] = {}
        weights: dict[str, float] = {}
        for name, reward in self.rewards.items():
            single = reward.pointwise if isinstance(reward, GroupReward) else reward
            if single is not None:
                rewards[name.removeprefix(RANK)] = single
                weights[name.removeprefix(RANK)] = self.weights[name]
        part = CompositeReward(rewards, weights)
        # failures of both count together
        part.failures = self.failures
        for name in rewards:
            part.failures.setdefault(name, 0)
        return part

    def prepare(self) -> None:
        """Load the models of all rewards, or raise RewardError."""
        for reward in self.rewards.values():
            reward.prepare()

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        """Raise RewardError for the first prompt whose metadata a reward cannot use."""
        for reward in self.rewards.values():
            reward.check_metadata(metadata)

    def leave_out_unusable(
        self, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, str]:
        """Drop rewards that can score none of these images, and return the reasons by name.

        The remaining rewards are prepared.

        Raises:
            RewardError: no reward can score an image.
        """
        reasons: dict[str, str] = {}
        for name, reward in self.rewards.items():
            try:
                _check_any(reward, prompts, metadata)
                reward.prepare()
            except RewardError as error:
                reasons[name] = str(error)
        if reasons and len(reasons) == len(self.rewards):
            raise RewardError("; ".join(reasons.values()))
        for name in reasons:
            del self.rewards[name], self.weights[name], self.failures[name]
        return reasons

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Return weighted sums (B,), NaN for images that a reward failed to score."""
        total = np.zeros(len(prompts), np.float32)
        details: dict[str, np.ndarray] = {}
        for name, reward in self.rewards.items():
            part = self._score_part(name, images, prompts, metadata)
            values = np.asarray(reward.normalize(part.values), np.float32)
            details[name] = values
            if (reward.card.scale, reward.card.offset) != (1.0, 0.0):
                details[f"{name}/raw"] = part.values
            details |= {f"{name}/{key}": value for key, value in part.details.items()}
            total += self.weights[name] * values
        return RewardOutput(values=total, details=details)

    def _score_part(
        self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        reward = self.rewards[name]
        rows = [i for i, text in enumerate(prompts) if text.strip() or not reward.needs_prompt]
        if len(rows) == len(prompts):
            part = self._attempt(name, images, prompts, metadata)
        elif rows:
            texts, entries = [prompts[i] for i in rows], [metadata[i] for i in rows]
            part = _at(rows, len(prompts), self._attempt(name, images[rows], texts, entries))
        else:
            part = RewardOutput(np.full(len(prompts), np.nan, np.float32))
        self.failures[name] += int((~part.mask).sum())
        return part

    def _attempt(
        self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Score images, and note an error that made the reward score them one by one."""
        part, error = score_all(self.rewards[name], images, prompts, metadata, name=name)
        if error is not None:
            self.last_error = f"{type(error).__name__}: {error}"
            failed = int((~part.mask).sum())
            logger.warning(
                "reward %s failed on %d of %d images: %s",
                name,
                failed,
                len(prompts),
                self.last_error,
            )
        return part


def _check_any(reward: Reward, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """Raise the first image's RewardError if the reward can score no image."""
    first: RewardError | None = None
    for text, entry in zip(prompts, metadata, strict=True):
        try:
            reward.check_metadata([entry])
        except RewardError as error:
            first = first or error
            continue
        if text.strip() or not reward.needs_prompt:
            return
        first = first or RewardError(
            f"reward {reward.card.name!r} needs captions, and no image has one; see docs/rewards.md"
        )
    if first is not None:
        raise first


def _at(rows: Sequence[int], n: int, part: RewardOutput) -> RewardOutput:
    """Spread the output of `rows` over n images, with NaN for the others."""

    def spread(values: np.ndarray) -> np.ndarray:
        column = np.full(n, np.nan, np.float32)
        column[rows] = values
        return column

    return RewardOutput(spread(part.values), {k: spread(v) for k, v in part.details.items()})
