"""Rows of preference data as they are found on disk: parquet, json, csv, tar; a file or a folder of them.

A row is a mapping of its columns. Rows come one by one, always in the same order, and the first ones can be left out
without being read, so that a pass over hundreds of gigabytes goes on where it was interrupted.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

from diffalign.core.errors import UserError

OWN = "pairs.jsonl"
TABLES = (OWN, "metadata.jsonl", "metadata.csv")
SUFFIXES = (".parquet", ".tar", ".jsonl", ".json", ".csv")
TAR_IMAGES = (".jpg", ".jpeg", ".png", ".webp")


class PairsError(UserError, ValueError):
    """Preference data that cannot be used; the message names the file and what is expected."""


@dataclass(frozen=True)
class Row:
    """`place` names it in messages; `folder` is where relative paths start."""

    columns: Mapping[str, Any]
    place: str
    folder: Path


def tables(source: str | Path) -> list[Path]:
    """The files of a source, in order.

    Raises:
        PairsError: there are none.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise PairsError(f"pairs.source: {path} must end in {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise PairsError(
            f"pairs.source: {str(source)!r} is neither a file nor a folder; `diffalign pairs` makes one, and "
            "docs/preferences.md lists what is read"
        )
    for name in TABLES:
        if (path / name).is_file():
            return [path / name]
    for suffix in SUFFIXES:
        if found := sorted(path.rglob(f"*{suffix}")):
            return found
    raise PairsError(f"pairs.source: no {', '.join(SUFFIXES)} in {path}")


def rows(source: str | Path, *, start: int = 0) -> Iterator[Row]:
    """All rows from number `start` on."""
    number = 0
    for file in tables(source):
        read = _READERS.get(file.suffix, _json)
        for row in read(file, start - number):
            number += 1
            if row is not None:
                yield row


def _open_parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise PairsError(f"{file} is not readable: {error}") from error


# Readers yield None, and read nothing, for each of the first `skip` rows.
Rows = Iterator[Row | None]


def _parquet(file: Path, skip: int) -> Rows:
    import pyarrow as pa

    table = _open_parquet(file)
    number = 0
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).num_rows
        if number + size <= skip:
            number += size
            yield from repeat(None, size)
            continue
        try:
            for batch in table.iter_batches(batch_size=32, row_groups=[group]):
                for columns in batch.to_pylist():
                    row = Row(columns, f"{file}, row {number}", file.parent)
                    yield row if number >= skip else None
                    number += 1
        except (OSError, pa.ArrowException) as error:
            raise PairsError(f"{file} is damaged at row {number}: {error}") from error


def _numbered(entries: Iterable[Any], file: Path, skip: int) -> Rows:
    """Entries of a table as rows; PairsError for one that is no object."""
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise PairsError(f"{file}, row {number} is no object")
        row = Row(entry, f"{file}, row {number}", file.parent)
        yield row if number >= skip else None


def _csv(file: Path, skip: int) -> Rows:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            yield from _numbered(csv.DictReader(stream), file, skip)
    except (UnicodeDecodeError, csv.Error) as error:
        raise PairsError(f"{file} is not readable: {error}") from error


def _json(file: Path, skip: int) -> Rows:
    """A list of objects, or one object a line."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            if file.suffix == ".json":
                entries = json.load(stream)
                if not isinstance(entries, list):
                    raise PairsError(f"{file} must hold a list of objects")
            else:
                entries = (json.loads(line) for line in stream if line.strip())
            yield from _numbered(entries, file, skip)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PairsError(f"{file} is not readable: {error}") from error


def _tar(file: Path, skip: int) -> Rows:
    """Members of one sample share their name up to the first dot, as WebDataset has it."""
    try:
        with tarfile.open(file) as archive:
            files = (member for member in archive if member.isfile())
            samples = groupby(files, key=lambda member: member.name.partition(".")[0])
            for number, (name, members) in enumerate(samples):
                if number < skip:
                    yield None
                    continue
                columns: dict[str, Any] = {}
                for member in members:
                    key = member.name.partition(".")[2]
                    stream = archive.extractfile(member)
                    assert stream is not None
                    columns[key.rpartition(".")[0] or key] = _member(key, stream.read())
                yield Row(columns, f"{file}, {name}", file.parent)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PairsError(f"{file} is not readable: {error}") from error


def _member(key: str, value: bytes) -> Any:
    if key.lower().endswith(TAR_IMAGES):
        return value
    return value.decode("utf-8", errors="replace").strip()


_READERS = {".parquet": _parquet, ".tar": _tar, ".csv": _csv}
