"""Rewards and feature networks as judges that a benchmark can ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.judges.base import Judge, JudgeCard, Reply, Task
from diffalign.judges.packing import pack
from diffalign.rewards.features import FeatureNetwork
from diffalign.types import RewardOutput


def stacks(tasks: Sequence[Task]) -> list[list[int]]:
    """Return the rows of tasks whose images have one size."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for row, (_, images) in enumerate(tasks):
        sizes.setdefault(images[0].size, []).append(row)
    return list(sizes.values())


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as (B, 3, H, W) uint8."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


class RewardJudge(Judge):
    """Rewards as one judge, which replies with their raw values.

    Args:
        composite: `CompositeReward` whose rewards are loaded.
    """

    at_once = 32

    def __init__(self, composite: Any) -> None:
        self.composite = composite
        rewards = composite.rewards
        self.names = list(rewards)
        revisions = [str(r.card.revision or r.card.model_id or "") for r in rewards.values()]
        self.card = JudgeCard(
            ",".join(self.names), ",".join(revisions), ("reward",), "raw values of rewards"
        )

    def answer(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return the raw values of each image, NaN where a reward has none."""
        replies = [Reply(error="not scored")] * len(tasks)
        for rows in stacks(tasks):
            images = pixels([tasks[i][1][0] for i in rows])
            questions = [tasks[i][0] for i in rows]
            output: RewardOutput = self.composite.score(
                images, [q.text for q in questions], [dict(q.metadata) for q in questions]
            )
            columns = [self._column(output, name) for name in self.names]
            for k, i in enumerate(rows):
                values = tuple(float(column[k]) for column in columns)
                replies[i] = Reply(text=",".join(self.names), low=values, high=values)
        return replies

    def _column(self, output: RewardOutput, name: str) -> np.ndarray:
        raw = output.details.get(f"{name}/raw")
        return np.asarray(output.details[name] if raw is None else raw)


class FeatureJudge(Judge):
    """Feature network as a judge, which replies with an image's features.

    Args:
        network: network whose weights are loaded.
    """

    at_once = 32

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.card = JudgeCard(network.name, network.weights, ("features",), network.resize)

    def answer(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return the features of each image as text."""
        replies = [Reply(error="no features")] * len(tasks)
        for rows in stacks(tasks):
            features = self.network(pixels([tasks[i][1][0] for i in rows])).numpy()
            for k, i in enumerate(rows):
                finite = bool(np.isfinite(features[k]).all())
                replies[i] = (
                    Reply(text=pack(features[k])) if finite else Reply(error="features not finite")
                )
        return replies
