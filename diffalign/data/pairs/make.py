"""Create a preference data set by scoring images of the same prompts with a reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.core.files import write_text
from diffalign.data.images import CaptionedImage, batches
from diffalign.data.pairs.ranking import choose_pairs, rank_weights
from diffalign.data.pairs.structures import of_image
from diffalign.data.pairs.tables import OWN
from diffalign.geneval.rules import Detection
from diffalign.types import RewardOutput

Row = dict[str, Any]
Detect = Callable[[Tensor, Sequence[Mapping[str, Any]]], list[list[Detection]]]


class Rewards(Protocol):
    """The part of a `CompositeReward` that scores images."""

    rewards: Mapping[str, Any]
    last_error: str | None

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score images (B, 3, H, W) uint8."""
        ...


@dataclass(frozen=True)
class PairOptions:
    """Which pairs are made of a prompt's images, and how they count.

    Raises:
        UsageError: `rankdpo` weighs all pairs of a ranking, and they are not all picked.
    """

    pick: str = "best_worst"
    weights: str = "equal"
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        if self.weights == "rankdpo" and self.pick != "all":
            raise UsageError("--weights=rankdpo weighs all pairs of a ranking: it needs --pick=all")


def make_pairs(
    folder: Path,
    images: Sequence[CaptionedImage],
    reward: Rewards,
    options: PairOptions,
    *,
    batch_size: int,
    state: PartialState,
) -> dict[str, Any]:
    """Score images (all processes together), write `pairs.jsonl` into `folder`, and return a summary.

    Raises:
        UsageError: no prompt has a better image.
    """
    mine = range(state.process_index, len(images), state.num_processes)
    rows = _score([images[i] for i in mine], reward, batch_size=batch_size)
    rows = sorted(gather_object(rows), key=lambda row: row["file"])
    return _write(folder, rows, reward, options) if state.is_main_process else {}


def _score(images: list[CaptionedImage], reward: Rewards, *, batch_size: int) -> list[Row]:
    """One row per image: its rewards and, where a reward looks for objects, the objects."""
    detect: Detect | None = next(
        (r.detect for r in reward.rewards.values() if hasattr(r, "detect")), None
    )
    rows: list[Row] = [{} for _ in images]
    for numbers, pixels, error in batches(images, size=batch_size):
        if pixels is None:
            rows[numbers[0]] = {"file": str(images[numbers[0]].path), "error": error}
            continue
        prompts = [images[i].prompt for i in numbers]
        metadata = [p.metadata for p in prompts]
        output = reward.score(pixels, [p.text for p in prompts], metadata)
        objects = detect(pixels, metadata) if detect else None
        for k, i in enumerate(numbers):
            scores = {n: float(output.details[n][k]) for n in reward.rewards}
            rows[i] = {
                "file": str(images[i].path),
                "prompt": prompts[k].text,
                "metadata": metadata[k],
                "reward": float(output.values[k]),
                "scores": scores,
                "structure": None if objects is None else of_image(objects[k], scores).to_dict(),
            }
    return rows


def _write(folder: Path, rows: list[Row], reward: Rewards, options: PairOptions) -> dict[str, Any]:
    """Write `pairs.jsonl`; UsageError where no prompt has a better image."""
    usable = [r for r in rows if "error" not in r]
    groups = groupby(usable, key=lambda r: Path(r["file"]).parents[1].name)
    pairs = [row for _, group in groups for row in _pairs(folder, list(group), options)]
    if options.weights == "rankdpo" and pairs:
        # a learning rate means the same with and without
        mean = sum(row["weight"] for row in pairs) / len(pairs)
        for row in pairs:
            row["weight"] /= mean
    if not pairs:
        raise UsageError(
            f"no prompt has images with different rewards: {reward.last_error or 'all are equal'}"
        )
    write_text(folder / OWN, "".join(f"{json.dumps(row)}\n" for row in pairs))
    return {
        "pairs": len(pairs),
        "prompts": len({Path(r["file"]).parents[1] for r in usable}),
        "images": len(rows),
        "unreadable": len(rows) - len(usable),
        "mean_reward": float(np.nanmean([r["reward"] for r in usable])),
        "file": str(folder / OWN),
    }


def _pairs(folder: Path, images: list[Row], options: PairOptions) -> list[Row]:
    """The rows of one prompt's images."""
    scores = [r["reward"] for r in images]
    chosen = choose_pairs(scores, pick=options.pick, min_gap=options.min_gap)
    rows = [_row(folder, images[a], images[b]) for a, b in chosen]
    if options.weights == "rankdpo" and rows:
        for row, weight in zip(rows, rank_weights(scores, chosen), strict=True):
            row["weight"] = weight
    return rows


def _row(folder: Path, better: Row, worse: Row) -> Row:
    """A line of the layout that `pairs.source` calls diffalign."""
    both = (better, worse)
    row = {
        "prompt": better["prompt"],
        "image_0": str(Path(better["file"]).relative_to(folder)),
        "image_1": str(Path(worse["file"]).relative_to(folder)),
        "label": 1.0,
        "scores": [r["scores"] for r in both],
        "metadata": better["metadata"],
    }
    if all(r["structure"] for r in both):
        row["structures"] = [r["structure"] for r in both]
    return row
