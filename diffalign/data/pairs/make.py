"""Create a preference data set by scoring images of the same prompts with a reward."""

from __future__ import annotations

import logging
import os
from collections import Counter
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
from diffalign.core.files import write_json_lines
from diffalign.data.images import CaptionedImage, batches
from diffalign.data.pairs.ranking import choose_pairs, rank_weights
from diffalign.data.pairs.structures import of_image
from diffalign.data.pairs.tables import OWN
from diffalign.geneval.rules import Detection
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)
Row = dict[str, Any]
Progress = Callable[[int, int], None]
Group = Callable[[CaptionedImage], str]
Detect = Callable[[Tensor, Sequence[Mapping[str, Any]]], list[list[Detection]]]


class Rewards(Protocol):
    """The part of a `CompositeReward` that scores images."""

    last_error: str | None

    @property
    def rewards(self) -> Mapping[str, Any]:
        """Rewards by name."""
        ...

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score images (B, 3, H, W) uint8."""
        ...


@dataclass(frozen=True)
class PairOptions:
    """Rules that choose and weight pairs of a prompt's images.

    Raises:
        UsageError: the weights are `rankdpo`, which need all pairs of a ranking, and `pick` is not "all".
    """

    pick: str = "best_worst"
    weights: str = "equal"
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        if self.weights == "rankdpo" and self.pick != "all":
            raise UsageError("weights: rankdpo weighs all pairs of a ranking: it needs `pick` all")


def by_place(image: CaptionedImage) -> str:
    """Return the name of a prompt's folder in GenEval's layout.

    Prompts with the same text have different folders.
    """
    return image.path.parents[1].name


def by_caption(image: CaptionedImage) -> str:
    """Return the caption of an image."""
    return image.prompt.text


def comparable(images: Sequence[CaptionedImage], folder: Path) -> list[CaptionedImage]:
    """Return the images whose caption at least one other image shares.

    Only images of one caption can be compared.

    Raises:
        UsageError: no two images share a caption.
    """
    counts = Counter(by_caption(image) for image in images if by_caption(image).strip())
    shared = [image for image in images if counts[by_caption(image)] > 1]
    if not shared:
        raise UsageError(
            f"{folder} has {len(images)} images and {len(counts)} captions, none of which two images share: a pair is "
            "two images of one caption (docs/data.md shows a table of such)"
        )
    if len(shared) < len(images):
        logger.warning(
            "%s: %d of %d images have a caption of their own, or none, and make no pair",
            folder,
            len(images) - len(shared),
            len(images),
        )
    return shared


def make_pairs(
    folder: Path,
    images: Sequence[CaptionedImage],
    reward: Rewards,
    options: PairOptions,
    *,
    batch_size: int,
    state: PartialState,
    group: Group = by_place,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score images, write `pairs.jsonl` into `folder`, and return a summary.

    The processes share the images. Only the main process writes and returns a summary.

    Args:
        group: returns the same text for images that are compared with each other.

    Raises:
        UsageError: the images of every prompt have equal rewards.
    """
    mine = range(state.process_index, len(images), state.num_processes)
    rows = _score(
        [images[i] for i in mine], reward, group, batch_size=batch_size, progress=progress
    )
    rows = sorted(gather_object(rows), key=lambda row: (row["group"], row["file"]))
    return _write(folder, rows, reward, options) if state.is_main_process else {}


def _score(
    images: list[CaptionedImage],
    reward: Rewards,
    group: Group,
    *,
    batch_size: int,
    progress: Progress | None,
) -> list[Row]:
    """Return one row per image: its rewards and, if a reward detects objects, the objects."""
    detect: Detect | None = next(
        (r.detect for r in reward.rewards.values() if hasattr(r, "detect")), None
    )
    rows: list[Row] = [{"file": str(i.path), "group": group(i)} for i in images]
    for numbers, pixels, error in batches(images, size=batch_size):
        if progress is not None:
            progress(numbers[0], len(images))
        if pixels is None:
            rows[numbers[0]]["error"] = error
            continue
        prompts = [images[i].prompt for i in numbers]
        metadata = [p.metadata for p in prompts]
        output = reward.score(pixels, [p.text for p in prompts], metadata)
        objects = detect(pixels, metadata) if detect else None
        for k, i in enumerate(numbers):
            scores = {n: float(output.details[n][k]) for n in reward.rewards}
            rows[i] |= {
                "prompt": prompts[k].text,
                "metadata": metadata[k],
                "reward": float(output.values[k]),
                "scores": scores,
                "structure": None if objects is None else of_image(objects[k], scores).to_dict(),
            }
    return rows


def _write(folder: Path, rows: list[Row], reward: Rewards, options: PairOptions) -> dict[str, Any]:
    """Write `pairs.jsonl`; raise UsageError if all images of every prompt score the same."""
    usable = [r for r in rows if "error" not in r]
    groups = groupby(usable, key=lambda r: r["group"])
    pairs = [row for _, group in groups for row in _pairs(folder, list(group), options)]
    if options.weights == "rankdpo" and pairs:
        # the mean weight is 1, so that a learning rate means the same with and without weights
        mean = sum(row["weight"] for row in pairs) / len(pairs)
        for row in pairs:
            row["weight"] /= mean
    if not pairs:
        raise UsageError(
            f"no prompt has images with different rewards: {reward.last_error or 'all are equal'}. Draw more "
            "images of each, or "
            "choose other rewards"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / OWN, pairs)
    return {
        "pairs": len(pairs),
        "prompts": len({r["group"] for r in usable}),
        "images": len(rows),
        "unreadable": len(rows) - len(usable),
        "mean_reward": float(np.nanmean([r["reward"] for r in usable])),
        "file": str(folder / OWN),
    }


def _pairs(folder: Path, images: list[Row], options: PairOptions) -> list[Row]:
    """Return the rows of the pairs of one prompt's images."""
    scores = [r["reward"] for r in images]
    pairs = choose_pairs(scores, pick=options.pick, min_gap=options.min_gap)
    rows = [_row(folder, images[a], images[b]) for a, b in pairs]
    if options.weights == "rankdpo" and rows:
        for row, weight in zip(rows, rank_weights(scores, pairs), strict=True):
            row["weight"] = weight
    return rows


def _row(folder: Path, better: Row, worse: Row) -> Row:
    """Return the row of one pair, in the layout that `pairs.preset` calls diffalign."""
    both = (better, worse)
    row = {
        "prompt": better["prompt"],
        "image_0": _name(Path(better["file"]), folder),
        "image_1": _name(Path(worse["file"]), folder),
        "label": 1.0,
        "scores": [r["scores"] for r in both],
        "metadata": better["metadata"],
    }
    if all(r["structure"] for r in both):
        row["structures"] = [r["structure"] for r in both]
    return row


def _name(file: Path, folder: Path) -> str:
    """Return an image's path relative to its table's folder, or absolute if it is outside."""
    inside = file.is_relative_to(folder)
    return str(file.relative_to(folder)) if inside else os.path.abspath(file)
