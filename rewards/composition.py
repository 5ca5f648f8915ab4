"""Several rewards as one: {name: weight}, each normalised first; a failure is a NaN, counted, never a silent 0."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from diffalign.rewards import registry
from diffalign.rewards.base import Metadata, Reward, RewardError
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)


class CompositeReward:
    """Weighted sum of normalised rewards.

    `details` of its output holds every part's normalised values under the part's name and its further details under
    "name/detail". An image for which a part failed has NaN in that part and in the sum. `failures` counts them.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards = dict(rewards)
        self.weights = dict(weights)
        self.failures: dict[str, int] = dict.fromkeys(rewards, 0)

    @classmethod
    def from_config(cls, weights: Mapping[str, float]) -> CompositeReward:
        for name in weights:
            registry.check_name(name)
        return cls({name: registry.create(name) for name in weights}, weights)

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        for reward in self.rewards.values():
            reward.check_metadata(metadata)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """(B,) weighted sums; RewardError when a reward fails on every image."""
        total = np.zeros(len(prompts), np.float32)
        details: dict[str, np.ndarray] = {}
        for name, reward in self.rewards.items():
            part = self._score_part(name, reward, images, prompts, metadata)
            values = np.asarray(reward.normalize(part.values), np.float32)
            details[name] = values
            details |= {f"{name}/{key}": value for key, value in part.details.items()}
            total += self.weights[name] * values
        return RewardOutput(values=total, details=details)

    def _score_part(
        self,
        name: str,
        reward: Reward,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> RewardOutput:
        try:
            part = reward.score(images, prompts, metadata)
        except Exception as error:  # one bad image must not cost the batch
            if len(prompts) == 1:
                part = RewardOutput(np.full(1, np.nan, np.float32))
                logger.warning("reward %s failed: %s: %s", name, type(error).__name__, error)
            else:
                part = self._one_by_one(name, reward, images, prompts, metadata, error)
        if part.values.shape != (len(prompts),):
            raise RewardError(
                f"reward {name!r} returned shape {part.values.shape} for {len(prompts)} images"
            )
        self.failures[name] += int((~part.mask).sum())
        return part

    def _one_by_one(
        self,
        name: str,
        reward: Reward,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        error: Exception,
    ) -> RewardOutput:
        values = np.full(len(prompts), np.nan, np.float32)
        for i in range(len(prompts)):
            try:
                values[i] = reward.score(
                    images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1]
                ).values[0]
            except Exception as failure:
                error = failure
        failed = int(np.isnan(values).sum())
        if failed == len(values):
            raise RewardError(f"reward {name!r} fails on every image: {error}") from error
        logger.warning(
            "reward %s failed on %d of %d images, last: %s", name, failed, len(values), error
        )
        return RewardOutput(values)
