"""Rewards of images that are there already: a folder with captions, whoever made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.core.errors import UsageError
from diffalign.core.versions import versions
from diffalign.data.images import CaptionedImage, batches, require_captions
from diffalign.evaluation.intervals import mean
from diffalign.evaluation.score import Progress, Score


def score_folder(
    images: Sequence[CaptionedImage],
    score: Score,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return one row per image, and the means over the images that have a value.

    A row has `file`, `prompt`, and a value of each reward and detail, or `error`.
    """
    rows: list[dict[str, Any]] = [
        {"file": str(image.path), "prompt": image.prompt.text} for image in images
    ]
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    done = 0
    for numbers, pixels, error in batches(images, size=batch_size):
        if pixels is None:
            rows[numbers[0]]["error"] = error
        else:
            prompts = [images[i].prompt for i in numbers]
            output = score(pixels, [p.text for p in prompts], [p.metadata for p in prompts])
            for k, i in enumerate(numbers):
                rows[i] |= {
                    name: float(v[k]) if np.isfinite(v[k]) else None
                    for name, v in output.details.items()
                }
        done += len(numbers)
        if progress is not None:
            progress(done, len(images))
    names = dict.fromkeys(n for r in rows for n, v in r.items() if isinstance(v, float))
    means = {n: float(np.mean([r[n] for r in rows if r.get(n) is not None])) for n in names}
    return rows, means


def counts(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return how many rows of `score_folder` each reward scored, and how many not.

    An image is not scored because its file is unreadable, it has no caption, or the reward failed.
    """
    scored = {name: sum(row.get(name) is not None for row in rows) for name in names}
    return {n: {"scored": k, "not_scored": len(rows) - k} for n, k in scored.items()}


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Return one score of the rows of `score_folder` (N,), NaN where a row has none."""
    return np.array([row.get(name) for row in rows], np.float64)


def prompt_names(images: Sequence[CaptionedImage]) -> list[str]:
    """Return the prompt of each image. An image without a caption is named by its path."""
    return [image.prompt.text or str(image.path) for image in images]


def folder_result(
    folder: Path,
    images: Sequence[CaptionedImage],
    rows: Sequence[Mapping[str, Any]],
    means: Mapping[str, float],
    reward: Any,
) -> dict[str, Any]:
    """Return the scores of a folder's images with intervals and provenance.

    The argument `reward` is the `CompositeReward` that made the scores. An image without a caption counts as a prompt
    of its own.
    """
    return {
        "folder": str(folder),
        "images": len(rows),
        "unreadable": sum("error" in row for row in rows),
        "without_caption": sum(not i.prompt.text for i in images),
        "counts": counts(rows, reward.rewards),
        "means": dict(means),
        "intervals": {
            name: estimate.to_dict()
            for name in means
            if (estimate := mean(column(rows, name), prompt_names(images))) is not None
        },
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        "versions": versions(),
    }


def check_captions(reward: Any, images: Sequence[CaptionedImage], folder: Path) -> None:
    """Raise ImageFolderError where rewards judge by the prompt and no image has one."""
    blind = [n for n, r in reward.rewards.items() if r.needs_prompt]
    if blind:
        require_captions(images, folder, why=f"{', '.join(blind)} needs captions")


def check_scored(
    rows: Sequence[Mapping[str, Any]], means: Mapping[str, float], reward: Any
) -> None:
    """Raise UsageError if no image of a folder could be read, or none scored."""
    if all("error" in row for row in rows):
        raise UsageError(f"no image could be read, for instance {rows[0]['error']}")
    if not means:
        raise UsageError(f"no image could be scored: {reward.last_error or 'all rewards are NaN'}")
