"""Reader of preference pairs: one record class for all layouts of votes.

A published layout is recognised by its columns; a column map names the columns of a custom layout. A row that cannot be
used is returned as `Skipped`, so that it can be counted and does not stop the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from diffalign.config import PairsConfig, nearest
from diffalign.core.text import unusable
from diffalign.data.pairs.tables import PairsError, rows
from diffalign.data.tables import Row

Image = Path | bytes
MAX_RANKED = 256
"""Largest number of images in one ranking; more would make tens of thousands of pairs."""
CANONICAL = ("prompt", "image_0", "image_1", "label", "label_0", "label_1", "weight")


@dataclass(frozen=True)
class PreferencePair:
    """Two images of one prompt, and the preference between them.

    Attributes:
        prompt: text of the prompt.
        images: paths or contents of the two image files.
        preference: probability in 0..1 that the first image is the better one; 0.5 for a tie.
        row: number of the pair's row in the source.
        place: name of the row in messages.
        weight: weight of the pair in the loss.
        metadata: remaining columns of the row.
    """

    prompt: str
    images: tuple[Image, Image]
    preference: float
    row: int
    place: str
    weight: float = 1.0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """Row, or one of its pairs, that cannot be used, and the reason."""

    row: int
    place: str
    why: str


class _Unusable(ValueError):
    """Reason why a row is skipped."""


def read_pairs(config: PairsConfig, *, start: int = 0) -> Iterator[PreferencePair | Skipped]:
    """Yield the pairs of a source in order, beginning with row `start`.

    Images are not opened.

    Raises:
        PairsError: the source does not exist or is not readable, or its first row fits no layout.
    """
    layout = check_pairs(config)
    names = config.column_map
    numbered = enumerate(rows(config.source, start=start, columns=names.values()), start)
    # such a table has the images of one prompt in consecutive rows
    if layout.per_image:
        groups = groupby(numbered, key=lambda pair: _prompt_id(pair[1]))
        parts = (list(group) for _, group in groups)
    else:
        parts = ([one] for one in numbered)
    for part in parts:
        yield from _pairs_of(layout, [row for _, row in part], part[0][0], names)


def _prompt_id(row: Row) -> Any:
    """Return the key that a prompt's rows share; an unreadable row has its own key."""
    return object() if row.problem else row.columns.get("prompt_id")


def check_pairs(config: PairsConfig) -> Layout:
    """Return the layout of a source, recognised by its first row.

    Raises:
        PairsError: the source does not exist or is not readable, or its first row fits no layout.
    """
    if not config.source:
        raise PairsError(
            "names no preference pairs; see docs/preferences.md", setting="pairs.source"
        )
    return _layout(config)


def held_out(prompt: str, share: float) -> bool:
    """Return True for a prompt whose pairs are held out, decided by its text."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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


def _pairs_of(
    layout: Layout, group: Sequence[Row], number: int, names: Mapping[str, str]
) -> Iterator[PreferencePair | Skipped]:
    """Yield the pairs of rows that belong together, or Skipped if they cannot be used."""
    place = group[0].place
    try:
        group = [_renamed(row, names) for row in group]
        for row in group:
            _check_columns(row, layout)
        entries = [_checked(entry) for entry in _entries(layout, group)]
    except _Unusable as error:
        yield Skipped(number, place, str(error))
        return
    for entry in entries:
        yield PreferencePair(row=number, place=place, **entry)


def _entries(layout: Layout, group: Sequence[Row]) -> Sequence[dict[str, Any]]:
    """Return a layout's entries of rows; raise _Unusable for unexpected values."""
    try:
        return layout.read(group)
    except _Unusable:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise _Unusable(f"values of another kind ({type(error).__name__})") from error


def _check_columns(row: Row, layout: Layout) -> None:
    missing = [c for c in layout.known_by if c not in row.columns]
    if missing:
        raise _Unusable(f"no column {missing[0]!r}")


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    """Return a row whose columns have the names of the layout `diffalign`."""
    if row.problem:
        raise _Unusable(row.problem.partition(":")[0])
    missing = [theirs for theirs in names.values() if theirs not in row.columns]
    if missing:
        raise _Unusable(f"no column {missing[0]!r}")
    rest = {k: v for k, v in row.columns.items() if k not in set(names.values())}
    renamed = {name: row.columns[theirs] for name, theirs in names.items()}
    return replace(row, columns=rest | renamed)


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    prompt = entry["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise _Unusable("no prompt")
    if unusable(prompt):
        raise _Unusable("a prompt that no tokenizer takes")
    p, weight = entry["preference"], entry.get("weight", 1.0)
    if not 0 <= p <= 1:
        raise _Unusable("label not within 0..1")
    if not 0 < weight < math.inf:
        raise _Unusable("weight not positive")
    return entry


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _Unusable(f"{name} is no number") from None
    if not math.isfinite(number):
        raise _Unusable(f"{name} is no number")
    return number


def _image(value: Any, row: Row, name: str) -> Image:
    """Return an image as bytes or a path; `datasets` has structs of both."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value and "\0" not in value:
        return row.folder / value
    raise _Unusable(f"no image in {name}")


def _two(row: Row, names: tuple[str, str]) -> tuple[Image, Image]:
    first, second = (_image(row.columns[n], row, n) for n in names)
    return first, second


def _share(a: float, b: float, what: str) -> float:
    """Return the first image's share of the votes; raise _Unusable without votes."""
    if a < 0 or b < 0:
        raise _Unusable(f"{what} are negative")
    if a + b == 0:
        raise _Unusable(f"no {what}")
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
        raise _Unusable("no label")
    rest = {k: v for k, v in columns.items() if k not in CANONICAL}
    return [
        {
            "prompt": columns["prompt"],
            "images": _two(group[0], ("image_0", "image_1")),
            "preference": p,
            "weight": _number(columns.get("weight", 1.0), "weight"),
            "metadata": rest,
        }
    ]


def _pickapic(group: Sequence[Row]) -> list[dict[str, Any]]:
    columns = group[0].columns
    if columns.get("has_label") is False:
        raise _Unusable("no label")
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
        raise _Unusable("no list of images")
    images = [_image(f, group[0], "file_path") for f in files]
    if "human_preference" in columns:
        if len(images) != 2:
            raise _Unusable(f"{len(images)} images with a preference of two")
        a, b = _two_numbers(columns["human_preference"], "human_preference")
        votes = {"preference": _share(a, b, "votes")}
        return [{"prompt": columns["prompt"], "images": (images[0], images[1]), **votes}]
    return _ranked(columns["prompt"], images, columns["rank"])


def _two_numbers(values: Any, name: str) -> tuple[float, float]:
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise _Unusable(f"{name} is not two numbers")
    return _number(values[0], name), _number(values[1], name)


def _ranked(prompt: Any, images: Sequence[Image], ranks: Any) -> list[dict[str, Any]]:
    """Return all pairs of a ranking in which a lower rank is better."""
    if len(images) > MAX_RANKED:
        raise _Unusable(f"a ranking of more than {MAX_RANKED} images")
    if not isinstance(ranks, list | tuple):
        raise _Unusable("no list of ranks")
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


def _hpdv3(group: Sequence[Row]) -> list[dict[str, Any]]:
    columns = group[0].columns
    votes = columns.get("choice_dist")
    p = 1.0
    if votes is not None and not isinstance(votes, list | tuple):
        raise _Unusable("choice_dist is no list")
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


def _layout(config: PairsConfig) -> Layout:
    """Return the layout that the settings name, or the one that fits the first row.

    Raises:
        PairsError: the first row lacks a column.
    """
    named = _named_layout(config)
    first = _first(config)
    columns = set(first.columns)
    if named is None:
        for layout in LAYOUTS.values():
            if columns.issuperset(layout.known_by):
                return layout
        raise PairsError(
            f"{first.place} has the columns {', '.join(map(str, first.columns))}, of no known layout: "
            f"name one with pairs.preset ({', '.join(LAYOUTS)}) or your columns with pairs.column_map",
            setting="pairs.source",
        )
    names = config.column_map
    missing = [theirs for theirs in names.values() if theirs not in columns]
    missing += [c for c in named.known_by if c not in columns and c not in names]
    if missing:
        raise PairsError(
            f"{first.place} has no column {missing[0]!r}; it has {', '.join(map(str, first.columns))}",
            setting="pairs.column_map" if names else "pairs.preset",
        )
    return named


def _named_layout(config: PairsConfig) -> Layout | None:
    """Return the layout that the settings name, or None."""
    if config.preset is not None:
        if config.preset not in LAYOUTS:
            raise PairsError(
                f"unknown layout {config.preset!r}{nearest(config.preset, list(LAYOUTS))}",
                setting="pairs.preset",
            )
        return LAYOUTS[config.preset]
    for name in config.column_map:
        if name not in CANONICAL:
            raise PairsError(
                f"no column {name!r}{nearest(name, CANONICAL)}", setting="pairs.column_map"
            )
    return LAYOUTS["diffalign"] if config.column_map else None


def _first(config: PairsConfig) -> Row:
    """Return the first row that can be read."""
    problem = ""
    for row in rows(config.source, columns=config.column_map.values()):
        if not row.problem:
            return row
        problem = problem or f"{row.place} {row.problem}"
    raise PairsError(
        f"{problem}, and no other row of {config.source} can be read. Correct one of its rows"
        if problem
        else f"{config.source} has no rows. Name a table that has some",
        setting="pairs.source",
    )
