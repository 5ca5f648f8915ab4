"""Preference pairs: one record, whatever the votes looked like.

A known layout is told by its columns; one of one's own is named with a column map. What is wrong with a single row is
no reason to lose the others: it comes back as `Skipped`, to be counted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from diffalign.config import PairsConfig, nearest
from diffalign.data.pairs.tables import PairsError, Row, rows

Image = Path | bytes
CANONICAL = ("prompt", "image_0", "image_1", "label", "label_0", "label_1", "weight")


@dataclass(frozen=True)
class PreferencePair:
    """Two images of one prompt. `preference`: probability in 0..1 that the first is the better one (0.5: a tie);
    `row`: number of its row in the source, `place` its name in messages."""

    prompt: str
    images: tuple[Image, Image]
    preference: float
    row: int
    place: str
    weight: float = 1.0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A row, or a pair of it, that cannot be used, and why."""

    row: int
    place: str
    why: str


class _Unusable(ValueError):
    """Why a row is skipped."""


def read_pairs(config: PairsConfig, *, start: int = 0) -> Iterator[PreferencePair | Skipped]:
    """All pairs of a source in order, from those of row `start` on; images are not opened yet.

    Raises:
        PairsError: there is no such source, it is not readable, or its first row has the columns of no known layout.
    """
    if not config.source:
        raise PairsError("pairs.source: names no preference pairs; see docs/preferences.md")
    layout = _layout(config)
    numbered = enumerate(rows(config.source, start=start), start)
    if layout.per_image:  # rows of one prompt follow each other
        groups = groupby(numbered, key=lambda pair: pair[1].columns.get("prompt_id"))
        parts = (list(group) for _, group in groups)
    else:
        parts = ([one] for one in numbered)
    for part in parts:
        found = [row for _, row in part]
        yield from _pairs_of(layout, found, part[0][0], config.column_map)


def held_out(prompt: str, share: float) -> bool:
    """Whether pairs of this prompt are kept for validation: a function of the prompt alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Layout:
    """`read` makes entries (prompt, images, preference and perhaps more) of a row, or of all rows of a prompt where
    rows are single images; `known_by` are the columns that tell it from others and must be there."""

    read: Callable[[Sequence[Row]], Sequence[dict[str, Any]]]
    known_by: tuple[str, ...]
    per_image: bool = False


def _pairs_of(
    layout: Layout, found: Sequence[Row], number: int, names: Mapping[str, str]
) -> Iterator[PreferencePair | Skipped]:
    """Of the rows that belong together; PairsError where a column is missing."""
    try:
        if names:
            found = [_renamed(row, names) for row in found]
        missing = [c for row in found for c in layout.known_by if c not in row.columns]
        if missing:
            raise PairsError(
                f"{found[0].place} has no column {missing[0]!r}; it has {', '.join(found[0].columns)}"
            )
        for entry in layout.read(found):
            yield PreferencePair(row=number, place=found[0].place, **_checked(entry))
    except _Unusable as error:
        yield Skipped(number, found[0].place, str(error))


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    missing = [there for there in names.values() if there not in row.columns]
    if missing:
        raise PairsError(
            f"pairs.column_map: {row.place} has no column {missing[0]!r}; it has {', '.join(row.columns)}"
        )
    taken = set(names.values())
    rest = {k: v for k, v in row.columns.items() if k not in taken}
    return Row(
        {**rest, **{ours: row.columns[there] for ours, there in names.items()}},
        row.place,
        row.folder,
    )


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    prompt = entry["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise _Unusable("no prompt")
    p, weight = entry["preference"], entry.get("weight", 1.0)
    if not 0 <= p <= 1:
        raise _Unusable("label not within 0..1")
    if not 0 < weight < math.inf:
        raise _Unusable("weight not positive")
    return entry


def _number(value: Any, name: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise _Unusable(f"{name} is no number") from None
    if not math.isfinite(found):
        raise _Unusable(f"{name} is no number")
    return found


def _image(value: Any, row: Row, name: str) -> Image:
    """Bytes, a path, or datasets' struct of both."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        return row.folder / value
    raise _Unusable(f"no image in {name}")


def _two(row: Row, names: tuple[str, str]) -> tuple[Image, Image]:
    first, second = (_image(row.columns[n], row, n) for n in names)
    return first, second


def _share(a: float, b: float, what: str) -> float:
    """Votes to a probability; no vote at all says nothing."""
    if a < 0 or b < 0:
        raise _Unusable(f"{what} are negative")
    if a + b == 0:
        raise _Unusable(f"no {what}")
    return a / (a + b)


# A layout makes entries (prompt, images, preference and perhaps more) of its rows.


def _own(found: Sequence[Row]) -> list[dict[str, Any]]:
    columns = found[0].columns
    if "label" in columns:
        p = _number(columns["label"], "label")
    else:
        a, b = (_number(columns[n], n) for n in ("label_0", "label_1"))
        p = _share(a, b, "labels")
    rest = {k: v for k, v in columns.items() if k not in CANONICAL}
    return [
        {
            "prompt": columns["prompt"],
            "images": _two(found[0], ("image_0", "image_1")),
            "preference": p,
            "weight": _number(columns.get("weight", 1.0), "weight"),
            "metadata": rest,
        }
    ]


def _pickapic(found: Sequence[Row]) -> list[dict[str, Any]]:
    columns = found[0].columns
    if columns.get("has_label") is False:
        raise _Unusable("no label")
    label = _number(columns["label_0"], "label_0")
    return [
        {
            "prompt": columns["caption"],
            "images": _two(found[0], ("jpg_0", "jpg_1")),
            "preference": label,
        }
    ]


def _webdataset(found: Sequence[Row]) -> list[dict[str, Any]]:
    row = found[0]
    return _pickapic(
        [Row({**row.columns, "caption": row.columns["original_prompt"]}, row.place, row.folder)]
    )


def _hpdv2(found: Sequence[Row]) -> list[dict[str, Any]]:
    columns = found[0].columns
    files = columns["file_path"] if "file_path" in columns else columns["image_path"]
    images = [_image(f, found[0], "file_path") for f in files]
    if "human_preference" in columns:
        a, b = (_number(v, "human_preference") for v in columns["human_preference"])
        if len(images) != 2:
            raise _Unusable(f"{len(images)} images with a preference of two")
        votes = {"preference": _share(a, b, "votes")}
        return [{"prompt": columns["prompt"], "images": (images[0], images[1]), **votes}]
    return _ranked(columns["prompt"], images, columns["rank"])


def _ranked(prompt: Any, images: Sequence[Image], ranks: Sequence[Any]) -> list[dict[str, Any]]:
    """All pairs of a ranking in which a lower rank is better."""
    if len(images) != len(ranks):
        raise _Unusable(f"{len(images)} images with {len(ranks)} ranks")
    numbers = [_number(r, "rank") for r in ranks]
    return [
        {
            "prompt": prompt,
            "images": (images[i], images[j]),
            "preference": 0.5 * (1 + (numbers[i] < numbers[j]) - (numbers[i] > numbers[j])),
        }
        for i, j in combinations(range(len(images)), 2)
    ]


def _hpdv3(found: Sequence[Row]) -> list[dict[str, Any]]:
    columns = found[0].columns
    votes = columns.get("choice_dist")
    p = 1.0
    if votes and len(votes) == 2:  # the first path is the preferred one, whatever the votes' order
        a, b = sorted((_number(v, "choice_dist") for v in votes), reverse=True)
        p = _share(a, b, "votes")
    return [
        {"prompt": columns["prompt"], "images": _two(found[0], ("path1", "path2")), "preference": p}
    ]


def _rapidata(found: Sequence[Row]) -> list[dict[str, Any]]:
    columns = found[0].columns
    a, b = (_number(columns[n], n) for n in ("votes_image1", "votes_image2"))
    return [
        {
            "prompt": columns["prompt"],
            "images": _two(found[0], ("image1", "image2")),
            "preference": _share(a, b, "votes"),
        }
    ]


def _imagereward(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of single images of one prompt."""
    images = [_image(r.columns["image"], r, "image") for r in found]
    ranks = [r.columns["rank"] for r in found]
    return _ranked(found[0].columns["prompt"], images, ranks)


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


def _layout(config: PairsConfig) -> Layout:
    """The layout that is asked for, or the one whose columns the first row has."""
    if config.preset is not None:
        if config.preset not in LAYOUTS:
            raise PairsError(
                f"pairs.preset: unknown layout {config.preset!r}{nearest(config.preset, list(LAYOUTS))}"
            )
        return LAYOUTS[config.preset]
    for name in config.column_map:
        if name not in CANONICAL:
            raise PairsError(f"pairs.column_map: no column {name!r}{nearest(name, CANONICAL)}")
    if config.column_map:
        return LAYOUTS["diffalign"]
    first = next(rows(config.source), None)
    if first is None:
        raise PairsError(f"pairs.source: {config.source} has no rows")
    for layout in LAYOUTS.values():
        if all(column in first.columns for column in layout.known_by):
            return layout
    raise PairsError(
        f"pairs.source: {first.place} has the columns {', '.join(first.columns)}, of no known layout: name one with "
        f"pairs.preset ({', '.join(LAYOUTS)}) or your columns with pairs.column_map"
    )
