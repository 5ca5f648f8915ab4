"""Reader of tables: parquet, csv, tsv, json, JSON lines and tar.

A row is a mapping of its columns. A row that cannot be read has a `problem` instead: readers of pairs count such a row,
readers of captions refuse it.
"""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby, repeat
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.core.errors import UserError, first_line
from diffalign.core.text import parse_json, read_json, read_lines, suffix_of
from diffalign.data.folders import IMAGE_SUFFIXES, is_hidden

SUFFIXES = (".parquet", ".tar", ".jsonl", ".json", ".csv", ".tsv")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
MAX_MEMBER = 512 * 1024**2
"""Largest size in bytes of a tar member; a longer one is no image."""
PADDING = 1024**2
"""Bytes that are read at once of the zeros at the end of a tar."""
PARQUET_BATCH = 32


@dataclass(frozen=True)
class Row:
    """Row of a table: its columns, or the problem that it has.

    Text tables also give the `line` of the row.
    """

    columns: Mapping[str, Any]
    file: Path
    number: int
    line: int | None = None
    name: str = ""
    """Key of the sample in a tar."""
    problem: str = ""

    @property
    def place(self) -> str:
        """Name of the row in messages about tables of any kind."""
        at = f"{self.file}:{self.line}" if self.line else str(self.file)
        return f"{at}, {self.name or f'row {self.number}'}"

    @property
    def at(self) -> str:
        """Name of the row in messages about text: its file and line."""
        return f"{self.file}:{self.line}" if self.line else self.place

    @property
    def folder(self) -> Path:
        """Folder that relative paths of the row are resolved against."""
        return self.file.parent


Rows = Iterator[Row | None]
"""Rows of a table, with None for each skipped row."""


def read_rows(file: Path, *, skip: int = 0, error: type[UserError]) -> Rows:
    """Yield the rows of a table, whose format is its file's suffix.

    Args:
        skip: number of leading rows to skip; None is yielded for each.
        error: class of the error to raise if the whole table cannot be read.
    """
    readers: dict[str, Callable[..., Rows]] = {".parquet": _parquet, ".tar": _tar}
    read = readers.get(suffix_of(file))
    if read is not None:
        yield from read(file, skip, error)
        return
    text = {".csv": _csv, ".tsv": _csv, ".json": _json}.get(suffix_of(file), _json_lines)
    for row in text(file, error):
        yield row if row.number >= skip else None


def _csv(file: Path, error: type[UserError]) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV; wrong width is a problem."""
    header: list[str] = []
    name = _NAMES[SEPARATORS[suffix_of(file)]]
    number = 0
    for line, values, damage in _records(file, error):
        if not header:
            if damage:
                raise error(f"{file}:{line} {damage}")
            header = _header(values, f"{file}:{line}", error, name=name)
            continue
        if damage or len(values) != len(header):
            narrow = f"has {len(values)} fields under a header of {len(header)}: a text with {name} needs quotes"
            yield Row({}, file, number, line, problem=damage or narrow)
        else:
            columns = dict(zip(header, values, strict=True))
            columns.pop("", None)
            yield Row(columns, file, number, line)
        number += 1


def _records(file: Path, error: type[UserError]) -> Iterator[tuple[int, list[str], str]]:
    """Yield first line, fields and problem of every record that is not blank."""
    lines = (line + "\n" for _, line in read_lines(file, error=error))
    separator = SEPARATORS[suffix_of(file)]
    reader = csv.reader(lines, strict=True, skipinitialspace=True, delimiter=separator)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as cause:
            if "end of data" in str(cause):
                raise error(f"{file}:{line} is not readable: a quote is never closed") from cause
            yield line, [], f"is not readable as CSV: {cause}"
            continue
        if any(value.strip() for value in values):
            yield line, values, ""


def _header(values: list[str], place: str, error: type[UserError], *, name: str) -> list[str]:
    """Return the names of the columns; an index column has an empty name."""
    other = next((n for sign, n in _NAMES.items() if len(values) == 1 and sign in values[0]), "")
    if other:
        raise error(
            f"{place} is separated by {other}, not by {name}: save the table as a .csv with commas or a .tsv with tabs"
        )
    names = [value.strip() for value in values]
    for column in names:
        if column and names.count(column) > 1:
            raise error(f"{place} names the column {column!r} twice")
    return names


def _json(file: Path, error: type[UserError]) -> Iterator[Row]:
    """Yield the rows of a JSON file that holds a list of objects."""
    entries = read_json(file, error=error)
    if not isinstance(entries, list):
        raise error(f"{file} must hold a list of objects")
    for number, entry in enumerate(entries):
        yield _object(entry, file, number, None)


def _json_lines(file: Path, error: type[UserError]) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line."""
    number = 0
    for line, text in read_lines(file, error=error):
        if not text.strip():
            continue
        try:
            row = _object(parse_json(text, "", error=error), file, number, line)
        except error as cause:
            row = Row({}, file, number, line, problem=str(cause).strip())
        yield row
        number += 1


def _object(entry: Any, file: Path, number: int, line: int | None) -> Row:
    if isinstance(entry, dict):
        return Row(entry, file, number, line)
    return Row({}, file, number, line, problem="is no object")


def open_parquet(file: Path, error: type[UserError]) -> Any:
    """Open a parquet file, or raise `error` if it is not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as cause:
        raise error(
            f"{file} is not readable: {first_line(cause)}. Save or download it again"
        ) from cause


def _parquet(file: Path, skip: int, error: type[UserError]) -> Rows:
    """Yield the rows of a parquet file; skipped row groups are not read."""
    import pyarrow as pa

    table = open_parquet(file, error)
    number = 0
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).num_rows
        if number + size <= skip:
            number += size
            yield from repeat(None, size)
            continue
        try:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group]):
                for row in _batch(batch, file, number):
                    yield row if number >= skip else None
                    number += 1
        except (OSError, pa.ArrowException) as cause:
            raise error(
                f"{file} is damaged at row {number}: {first_line(cause)}. Save or download it again"
            ) from cause


def _batch(batch: Any, file: Path, number: int) -> list[Row]:
    """Return the rows of a batch, numbered from `number`; damaged text is a problem."""
    try:
        return [Row(columns, file, number + i) for i, columns in enumerate(batch.to_pylist())]
    except UnicodeDecodeError:
        # which row is damaged shows when they are read one by one
        pass
    rows = []
    for i in range(batch.num_rows):
        try:
            (columns,) = batch.slice(i, 1).to_pylist()
            rows.append(Row(columns, file, number + i))
        except UnicodeDecodeError:
            rows.append(Row({}, file, number + i, problem="holds text that is not UTF-8"))
    return rows


def _tar(file: Path, skip: int, error: type[UserError]) -> Rows:
    """Yield the samples of a WebDataset tar, in which members of one key are adjacent."""
    try:
        with tarfile.open(file) as archive:
            members = (m for m in archive if m.isfile() and not _is_hidden(m.name))
            samples = groupby(members, key=lambda m: _key(m.name)[0])
            for number, (key, parts) in enumerate(samples):
                if number < skip:
                    yield None
                    continue
                yield _sample(parts, partial(Row, file=file, number=number, name=key), archive)
            _check_end(archive)
    except (tarfile.TarError, EOFError, OSError) as cause:
        raise error(
            f"{file} is not readable: {first_line(cause)}. Save or download it again"
        ) from cause


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless zeros follow the last member, because tarfile ends at any damage."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    place = f"at byte {archive.offset}"
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is cut off {place}, where an end-of-archive block belongs")
    while block:
        if any(block):
            raise tarfile.ReadError(f"it is damaged {place}, and what follows would be lost")
        block = archive.fileobj.read(PADDING)


def _key(name: str) -> tuple[str, str]:
    """Split a member's name at its first dot into the sample's key and the rest."""
    path = PurePosixPath(name)
    stem, _, rest = path.name.partition(".")
    return str(path.parent / stem), rest


def _is_hidden(name: str) -> bool:
    return any(is_hidden(part) for part in PurePosixPath(name).parts if part != "..")


def _sample(
    members: Iterator[tarfile.TarInfo], row: Callable[..., Row], archive: tarfile.TarFile
) -> Row:
    columns: dict[str, Any] = {}
    for member in members:
        if member.size > MAX_MEMBER:
            return row({}, problem=f"has a member of more than {MAX_MEMBER} bytes")
        name = _key(member.name)[1].lower()
        stream = archive.extractfile(member)
        assert stream is not None
        content = stream.read()
        column = name.rpartition(".")[0] or name
        try:
            is_image = name.endswith(tuple(IMAGE_SUFFIXES))
            columns[column] = content if is_image else content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            return row({}, problem="holds text that is not UTF-8")
    return row(columns)
