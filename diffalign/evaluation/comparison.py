"""`diffalign evaluate report`: one self-contained page that compares folders of images, whoever made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.core.errors import UserError
from diffalign.core.files import write_text
from diffalign.core.text import read_json_lines
from diffalign.data.images import CaptionedImage, read_image
from diffalign.evaluation import intervals
from diffalign.evaluation.figures import between, number
from diffalign.evaluation.geneval import RESULTS, summary
from diffalign.evaluation.intervals import NOTE, Difference
from diffalign.evaluation.pictures import PageImage, evenly, page_image
from diffalign.evaluation.preference import shared_names
from diffalign.evaluation.report import render_page

EXAMPLES = 24
OVERALL = "overall"


class ReportError(UserError, ValueError):
    """Folders that a page cannot be made of."""


@dataclass(frozen=True)
class Compared:
    """Folder on the page: its images by name, and how they were scored.

    `geneval` is GenEval's summary where the folder has been scored, `rewards` the means of rewards, `counts` how many
    images were `scored` and `not_scored` for each. `scores` has the values of each image by its name: of each reward,
    and whether it is `CORRECT`; without them a page has no intervals.
    """

    name: str
    folder: Path
    images: dict[str, CaptionedImage]
    geneval: dict[str, Any] | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


CORRECT = "geneval/correct"
"""Name of GenEval's verdict among the scores of images."""


def read_geneval(
    folder: Path, images: Sequence[CaptionedImage]
) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """Return the summary of a scored GenEval folder, and which images are correct.

    Return None and {} for a folder that is not scored.

    Args:
        images: the folder's images.

    Raises:
        ReportError: the folder's results are damaged.
    """
    file = folder / RESULTS
    if not file.is_file():
        return None, {}
    try:
        rows = read_json_lines(file)
        # as it is named within the folder, wherever the folder was when it was scored
        names = ["/".join(Path(row["filename"]).parts[-3:]) for row in rows]
        correct = {n: float(row["correct"]) for n, row in zip(names, rows, strict=True)}
        filled = {i.path.parents[1] for i in images}
        empty = sum(p.name.isdigit() and p.is_dir() and p not in filled for p in folder.iterdir())
        return summary(rows, empty=empty), correct
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ReportError(f"{file} is damaged ({error}): score the folder again") from error


def write_comparison(file: Path, sides: Sequence[Compared]) -> dict[str, Any]:
    """Write the page and return what its table says: values by row and side, their `intervals`, and which is `best`.

    Raises:
        PairError: no image has the same name in all folders, or a name stands for two prompts.
    """
    shared = shared_names([s.images for s in sides])
    examples = [
        {
            "name": name,
            "prompt": sides[0].images[name].prompt.text,
            "cells": [_example(s, name) for s in sides],
        }
        for name in evenly(shared, EXAMPLES)
    ]
    rows = table(sides)
    page = render_page(
        "comparison.html",
        sides=sides,
        rows=rows,
        examples=examples,
        shared=len(shared),
        note=NOTE,
        number=number,
        between=between,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    names = [s.name for s in sides]
    return {
        **{row["name"]: dict(zip(names, row["values"], strict=True)) for row in rows},
        "intervals": {
            row["name"]: {
                n: None if e is None else e.to_dict()
                for n, e in zip(names, row["intervals"], strict=True)
            }
            for row in rows
        },
        "best": {
            row["name"]: [n for n, b in zip(names, row["bold"], strict=True) if b] for row in rows
        },
    }


def table(sides: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return the rows of the table of scores.

    A row has its `name`; for each side `values` (None where it has none), `intervals`, `counts` of its images where it
    is a reward, whether it is `bold`, and the `width` of its bar in percent (of 1 for shares, of the largest magnitude
    for rewards); and the `best` value. Bold is the best side, if it is better than each other beyond noise.
    """
    columns: list[dict[str, float]] = [
        {**(s.geneval["tasks"] if s.geneval else {}), **s.rewards} for s in sides
    ]
    shares = {n for s in sides if s.geneval for n in s.geneval["tasks"]}
    rows = []
    for name in dict.fromkeys(n for c in columns for n in c):
        values = [c.get(name) for c in columns]
        numbers = [v for v in values if v is not None]
        full = 1.0 if name in shares else max(map(abs, numbers)) or 1.0
        rows.append(
            {
                "name": name,
                "values": values,
                "intervals": [_interval(s, name, task=name in shares) for s in sides],
                "counts": [s.counts.get(name) for s in sides],
                "best": max(numbers),
                "bold": _bold(sides, values, name, task=name in shares),
                "width": [0 if v is None else round(100 * max(v, 0) / full, 1) for v in values],
            }
        )
    return rows


def _bold(
    sides: Sequence[Compared], values: Sequence[float | None], name: str, *, task: bool
) -> list[bool]:
    """Return for each side whether it is better than each other, beyond noise."""
    rivals = [i for i, v in enumerate(values) if v is not None]

    def leads(i: int) -> bool:
        others = [difference(sides[i], sides[k], name, task=task) for k in rivals if k != i]
        return bool(others) and all(
            d is not None and d.value > 0 and not d.within_noise for d in others
        )

    return [i in rivals and leads(i) for i in range(len(sides))]


def difference(a: Compared, b: Compared, name: str, *, task: bool) -> Difference | None:
    """Return the paired difference of a score of two folders.

    Return None where the folders share no scored image."""
    mine, other = (_scores(side, name, task=task) for side in (a, b))
    names = [n for n in mine if n in other]
    if not names:
        return None
    first, second = (np.array([s[n] for n in names], np.float64) for s in (mine, other))
    prompts, tasks = _prompts(a, names), [a.images[n].prompt.task for n in names]
    if task and name == OVERALL:
        return intervals.task_difference(first, second, prompts, tasks).get(OVERALL)
    return intervals.difference(first, second, prompts)


def _interval(side: Compared, name: str, *, task: bool) -> intervals.Estimate | None:
    """Return the interval of a folder's own score."""
    if task and side.geneval:
        estimate = side.geneval.get("intervals", {}).get(name)
        return None if estimate is None else intervals.Estimate(**estimate)
    scores = _scores(side, name, task=task)
    values = np.array(list(scores.values()), np.float64)
    return intervals.mean(values, _prompts(side, list(scores))) if scores else None


def _scores(side: Compared, name: str, *, task: bool) -> dict[str, float]:
    """Return a score by image name: of a task whether its images are correct."""
    if not task:
        return {n: v for n, v in side.scores.get(name, {}).items() if n in side.images}
    return {
        n: v
        for n, v in side.scores.get(CORRECT, {}).items()
        if n in side.images and name in (OVERALL, side.images[n].prompt.task)
    }


def _prompts(side: Compared, names: Sequence[str]) -> list[str]:
    """Return the prompt of each image, and the name of an image without a caption."""
    return [side.images[n].prompt.text or n for n in names]


def _example(side: Compared, name: str) -> dict[str, Any]:
    """Return an image for the page, and its scores in words. The image is None where it cannot be read."""
    scores = {key: values[name] for key, values in side.scores.items() if name in values}
    correct = scores.pop(CORRECT, None)
    words = [] if correct is None else ["correct" if correct else "wrong"]
    return {
        "image": thumbnail(side.images[name].path),
        "scores": ", ".join([*words, *(f"{key} {number(value)}" for key, value in scores.items())]),
    }


def thumbnail(path: Path) -> PageImage | None:
    """Return an image for the page; None for an image that cannot be read."""
    try:
        pixels = read_image(path).permute(1, 2, 0).numpy()
    except OSError:
        return None
    return page_image(np.ascontiguousarray(pixels))
