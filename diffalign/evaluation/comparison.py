"""`diffalign evaluate report`: one self-contained page that compares folders of images, whoever made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.core.errors import UserError
from diffalign.core.files import write_text
from diffalign.core.text import read_json_lines
from diffalign.data.images import CaptionedImage, read_image
from diffalign.evaluation.geneval import RESULTS, read_samples, summary
from diffalign.evaluation.preference import shared_names
from diffalign.evaluation.report import evenly, png_uri, render_page

EXAMPLES = 24
THUMBNAIL = 256
"""Pixels of the longer side of an image on the page."""


class ReportError(UserError, ValueError):
    """Folders that a page cannot be made of."""


@dataclass(frozen=True)
class Compared:
    """A folder on the page: its images by name, GenEval's summary where it has been scored, means of rewards and how
    many images were `scored` and `not_scored` for each."""

    name: str
    folder: Path
    images: dict[str, CaptionedImage]
    geneval: dict[str, Any] | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def read_geneval(folder: Path) -> dict[str, Any] | None:
    """The summary of a scored GenEval folder; None where it has not been scored.

    Raises:
        ReportError: its results are damaged.
    """
    file = folder / RESULTS
    if not file.is_file():
        return None
    try:
        rows = read_json_lines(file)
        return summary(rows, empty=read_samples(folder)[1])
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{file} is damaged ({error}): score the folder again") from error


def write_comparison(file: Path, sides: Sequence[Compared]) -> dict[str, Any]:
    """Write the page and return what its table says.

    Raises:
        PairError: no image has the same name in all folders, or a name stands for two prompts.
    """
    shared = shared_names([s.images for s in sides])
    examples = [
        {
            "name": name,
            "prompt": sides[0].images[name].prompt.text,
            "images": [thumbnail(s.images[name].path) for s in sides],
        }
        for name in evenly(shared, EXAMPLES)
    ]
    rows = table(sides)
    page = render_page(
        "comparison.html", sides=sides, rows=rows, examples=examples, shared=len(shared)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    return {
        row["name"]: dict(zip([s.name for s in sides], row["values"], strict=True)) for row in rows
    }


def table(sides: Sequence[Compared]) -> list[dict[str, Any]]:
    """Rows of `name`, `values` of each side (None where it has none), `counts` of its images where it is a reward,
    their `best`, and the `width` of each one's bar in percent (of 1 for shares, of the largest magnitude for rewards).
    """
    columns: list[dict[str, float]] = [
        {**(s.geneval["tasks"] if s.geneval else {}), **s.rewards} for s in sides
    ]
    shares = {n for s in sides if s.geneval for n in s.geneval["tasks"]}
    found = []
    for name in dict.fromkeys(n for c in columns for n in c):
        values = [c.get(name) for c in columns]
        known = [v for v in values if v is not None]
        full = 1.0 if name in shares else max(map(abs, known)) or 1.0
        found.append(
            {
                "name": name,
                "values": values,
                "counts": [s.counts.get(name) for s in sides],
                "best": max(known),
                "width": [0 if v is None else round(100 * max(v, 0) / full, 1) for v in values],
            }
        )
    return found


def thumbnail(path: Path) -> str | None:
    """A data URI; None for an image that cannot be read."""
    try:
        pixels = read_image(path).permute(1, 2, 0).numpy()
    except OSError:
        return None
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return png_uri(np.asarray(image))
