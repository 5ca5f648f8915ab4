"""Reader of preference pairs: one record class for all layouts of votes.

A published layout is recognised by its columns; a column map names the columns of a custom layout. A row that cannot be
used is returned as `Skipped`, so that it can be counted and does not stop the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from diffalign.config import PairsConfig, nearest
from diffalign.core.text import unusable
from diffalign.data.pairs.layouts import CANONICAL, LAYOUTS, Image, Layout, Unusable
from diffalign.data.pairs.tables import PairsError, rows
from diffalign.data.tables import Row


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
        mask: path or content of the image that is white where the pair is compared, or None.
    """

    prompt: str
    images: tuple[Image, Image]
    preference: float
    row: int
    place: str
    weight: float = 1.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    mask: Image | None = None


@dataclass(frozen=True)
class Skipped:
    """Row, or one of its pairs, that cannot be used, and the reason."""

    row: int
    place: str
    why: str


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


def has_masks(config: PairsConfig) -> bool:
    """Return whether the first row of a source has a column of masks."""
    return (config.column_map.get("mask") or "mask") in _first(config).columns


def held_out(prompt: str, share: float) -> bool:
    """Return True for a prompt whose pairs are held out, decided by its text."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
    except Unusable as error:
        yield Skipped(number, place, str(error))
        return
    for entry in entries:
        yield PreferencePair(row=number, place=place, **entry)


def _entries(layout: Layout, group: Sequence[Row]) -> Sequence[dict[str, Any]]:
    """Return a layout's entries of rows; raise Unusable for unexpected values."""
    try:
        return layout.read(group)
    except Unusable:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise Unusable(f"values of another kind ({type(error).__name__})") from error


def _check_columns(row: Row, layout: Layout) -> None:
    missing = [c for c in layout.known_by if c not in row.columns]
    if missing:
        raise Unusable(f"no column {missing[0]!r}")


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    """Return a row whose columns have the names of the layout `diffalign`."""
    if row.problem:
        raise Unusable(row.problem.partition(":")[0])
    missing = [theirs for theirs in names.values() if theirs not in row.columns]
    if missing:
        raise Unusable(f"no column {missing[0]!r}")
    rest = {k: v for k, v in row.columns.items() if k not in set(names.values())}
    renamed = {name: row.columns[theirs] for name, theirs in names.items()}
    return replace(row, columns=rest | renamed)


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    prompt = entry["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise Unusable("no prompt")
    if unusable(prompt):
        raise Unusable("a prompt that no tokenizer takes")
    p, weight = entry["preference"], entry.get("weight", 1.0)
    if not 0 <= p <= 1:
        raise Unusable("label not within 0..1")
    if not 0 < weight < math.inf:
        raise Unusable("weight not positive")
    return entry


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
