"""Rewards of images that are there already: a folder with captions, whoever made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.core.errors import UsageError
from diffalign.core.versions import versions
from diffalign.data.images import CaptionedImage, batches, require_captions
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
        raise UsageError(f"--batch_size must be at least 1, got {batch_size}")
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
    """Of the rows of `score_folder`: how many images each reward scored, and how many not, for whatever reason (an
    unreadable file, no caption, a failure)."""
    found = {name: sum(row.get(name) is not None for row in rows) for name in names}
    return {n: {"scored": k, "not_scored": len(rows) - k} for n, k in found.items()}


def folder_result(
    folder: Path,
    images: Sequence[CaptionedImage],
    rows: Sequence[Mapping[str, Any]],
    means: Mapping[str, float],
    reward: Any,
) -> dict[str, Any]:
    """The scores of a folder's images with their provenance; `reward` is the `CompositeReward` that made them."""
    return {
        "folder": str(folder),
        "images": len(rows),
        "unreadable": sum("error" in row for row in rows),
        "without_caption": sum(not i.prompt.text for i in images),
        "counts": counts(rows, reward.rewards),
        "means": dict(means),
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        "versions": versions(),
    }


def check_captions(reward: Any, images: Sequence[CaptionedImage], folder: Path) -> None:
    """Raise ImageFolderError where rewards judge by the prompt and no image has one."""
    blind = [n for n, r in reward.rewards.items() if r.needs_prompt]
    if blind:
        require_captions(images, folder, why=f"{', '.join(blind)} needs captions")
