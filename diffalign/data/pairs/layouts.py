"""Published layouts of tables of votes, and their readers.

A layout is recognised by its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.data.tables import Row

Image = Path | bytes
MAX_RANKED = 256
"""Largest number of images in one ranking; more would make tens of thousands of pairs."""
CANONICAL = ("prompt", "image_0", "image_1", "label", "label_0", "label_1", "weight", "mask")


class Unusable(ValueError):
    """Reason why a row is skipped."""


@dataclass(frozen=True)
class Layout:
    """Layout of a table of votes.

    Attributes:
        read: function from rows to entries (prompt, images, preference and optional fields).
        known_by: required columns, which distinguish the layout from others.
        per_image: True if a row is a single image; `read` then receives all rows of a prompt, else one row.
    """

    read: Callable[[Sequence[Row]], Sequence[dict[str, Any]]]
    known_by: tuple[str, ...]
    per_image: bool = False


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Unusable(f"{name} is no number") from None
    if not math.isfinite(number):
        raise Unusable(f"{name} is no number")
    return number


def _image(value: Any, row: Row, name: str) -> Image:
    """Return an image as bytes or a path; `datasets` has structs of both."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value and "\0" not in value:
        return row.folder / value
    raise Unusable(f"no image in {name}")


def _mask(row: Row) -> Image | None:
    """Return a pair's mask, or None if the pair counts as a whole."""
    value = row.columns.get("mask")
    return None if value is None or value == "" else _image(value, row, "mask")


def _two(row: Row, names: tuple[str, str]) -> tuple[Image, Image]:
    first, second = (_image(row.columns[n], row, n) for n in names)
    return first, second


def _share(a: float, b: float, what: str) -> float:
    """Return the first image's share of the votes; raise Unusable without votes."""
    if a < 0 or b < 0:
        raise Unusable(f"{what} are negative")
    if a + b == 0:
        raise Unusable(f"no {what}")
    return a / (a + b)


# Readers of the layouts: rows to entries (prompt, images, preference and optional fields).


def _own(group: Sequence[Row]) -> list[dict[str, Any]]:
    columns = group[0].columns
    if "label" in columns:
        p = _number(columns["label"], "label")
    elif "label_0" in columns and "label_1" in columns:
        a, b = (_number(columns[n], n) for n in ("label_0", "label_1"))
        p = _share(a, b, "labels")
    else:
        raise Unusable("no label")
    rest = {k: v for k, v in columns.items() if k not in CANONICAL}
    return [
        {
            "prompt": columns["prompt"],
            "images": _two(group[0], ("image_0", "image_1")),
            "preference": p,
            "weight": _number(columns.get("weight", 1.0), "weight"),
            "mask": _mask(group[0]),
            "metadata": rest,
        }
    ]


def _pickapic(group: Sequence[Row]) -> list[dict[str, Any]]:
    columns = group[0].columns
    if columns.get("has_label") is False:
        raise Unusable("no label")
    label = _number(columns["label_0"], "label_0")
    return [
        {
            "prompt": columns["caption"],
            "images": _two(group[0], ("jpg_0", "jpg_1")),
            "preference": label,
        }
    ]


def _webdataset(group: Sequence[Row]) -> list[dict[str, Any]]:
    row = group[0]
    return _pickapic(
        [replace(row, columns={**row.columns, "caption": row.columns["original_prompt"]})]
    )


def _hpdv2(group: Sequence[Row]) -> list[dict[str, Any]]:
    columns = group[0].columns
    files = columns["file_path"] if "file_path" in columns else columns["image_path"]
    if not isinstance(files, list | tuple):
        raise Unusable("no list of images")
    images = [_image(f, group[0], "file_path") for f in files]
    if "human_preference" in columns:
        if len(images) != 2:
            raise Unusable(f"{len(images)} images with a preference of two")
        a, b = _two_numbers(columns["human_preference"], "human_preference")
        votes = {"preference": _share(a, b, "votes")}
        return [{"prompt": columns["prompt"], "images": (images[0], images[1]), **votes}]
    return _ranked(columns["prompt"], images, columns["rank"])


def _two_numbers(values: Any, name: str) -> tuple[float, float]:
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise Unusable(f"{name} is not two numbers")
    return _number(values[0], name), _number(values[1], name)


def _ranked(prompt: Any, images: Sequence[Image], ranks: Any) -> list[dict[str, Any]]:
    """Return all pairs of a ranking in which a lower rank is better."""
    if len(images) > MAX_RANKED:
        raise Unusable(f"a ranking of more than {MAX_RANKED} images")
    if not isinstance(ranks, list | tuple):
        raise Unusable("no list of ranks")
    if len(images) != len(ranks):
        raise Unusable(f"{len(images)} images with {len(ranks)} ranks")
    numbers = [_number(r, "rank") for r in ranks]
    return [
        {
            "prompt": prompt,
            "images": (images[i], images[j]),
            "preference": 0.5 * (1 + (numbers[i] < numbers[j]) - (numbers[i] > numbers[j])),
        }
        for i, j in combinations(range(len(images)), 2)
    ]


def _hpdv3(group: Sequence[Row]) -> list[dict[str, Any]]:
    columns = group[0].columns
    votes = columns.get("choice_dist")
    p = 1.0
    if votes is not None and not isinstance(votes, list | tuple):
        raise Unusable("choice_dist is no list")
    # the first path is the preferred one, whatever the order of the votes
    if votes and len(votes) == 2:
        a, b = sorted(_two_numbers(votes, "choice_dist"), reverse=True)
        p = _share(a, b, "votes")
    return [
        {"prompt": columns["prompt"], "images": _two(group[0], ("path1", "path2")), "preference": p}
    ]


def _rapidata(group: Sequence[Row]) -> list[dict[str, Any]]:
    columns = group[0].columns
    a, b = (_number(columns[n], n) for n in ("votes_image1", "votes_image2"))
    return [
        {
            "prompt": columns["prompt"],
            "images": _two(group[0], ("image1", "image2")),
            "preference": _share(a, b, "votes"),
        }
    ]


def _imagereward(group: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the pairs of one prompt, whose rows are single ranked images."""
    images = [_image(r.columns["image"], r, "image") for r in group]
    ranks = [r.columns["rank"] for r in group]
    return _ranked(group[0].columns["prompt"], images, ranks)


LAYOUTS = {
    "diffalign": Layout(_own, ("prompt", "image_0", "image_1")),
    "pickapic": Layout(_pickapic, ("caption", "jpg_0", "jpg_1", "label_0")),
    "webdataset": Layout(_webdataset, ("original_prompt", "jpg_0", "jpg_1", "label_0")),
    "hpdv2": Layout(_hpdv2, ("prompt", "human_preference", "file_path")),
    "hpdv2_test": Layout(_hpdv2, ("prompt", "image_path", "rank")),
    "hpdv3": Layout(_hpdv3, ("prompt", "path1", "path2")),
    "rapidata": Layout(_rapidata, ("prompt", "image1", "image2", "votes_image1", "votes_image2")),
    "imagereward": Layout(_imagereward, ("prompt", "prompt_id", "image", "rank"), per_image=True),
}
