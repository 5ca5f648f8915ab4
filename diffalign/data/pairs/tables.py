"""Tables of preference data: the files of a source, and their rows in a fixed order.

The first rows can be skipped without being read, so that a pass over hundreds of gigabytes can be resumed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from diffalign.core.errors import UserError
from diffalign.core.text import suffix_of
from diffalign.data.folders import keep_training_files, walk
from diffalign.data.tables import SUFFIXES, Row, read_rows

OWN = "pairs.jsonl"
TABLES = (OWN, "metadata.jsonl", "metadata.csv", "metadata.tsv")
COLUMNS = (
    *(
        "prompt",
        "image_0",
        "image_1",
        "label",
        "label_0",
        "label_1",
        "weight",
        "mask",
        "metadata",
        "scores",
    ),
    *("structures", "caption", "jpg_0", "jpg_1", "has_label", "original_prompt", "file_path"),
    *(
        "human_preference",
        "image_path",
        "rank",
        "path1",
        "path2",
        "choice_dist",
        "image1",
        "image2",
    ),
    *("votes_image1", "votes_image2", "prompt_id", "image"),
)
"""Columns of the layouts, which a table may write with capitals."""


class PairsError(UserError, ValueError):
    """Preference data that cannot be used; the message names the file and what is expected."""


def tables(source: str | Path) -> list[Path]:
    """Return the tables of a source, in order; of a dataset only the training split.

    Files that are left out are logged.

    Raises:
        PairsError: the source does not exist, or holds no table.
    """
    path = Path(source)
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise PairsError(f"{path} must end in {', '.join(SUFFIXES)}", setting="pairs.source")
        return [path]
    if not path.is_dir():
        raise PairsError(
            f"{str(source)!r} is neither a file nor a folder (there is no {path.absolute()}); "
            "`diffalign pairs` makes one, and docs/data.md shows the formats",
            setting="pairs.source",
        )
    # a folder of `diffalign pairs` holds many images beside its table, which decides
    try:
        own = {p.name.lower(): p for p in sorted(path.iterdir()) if p.is_file()}
    except OSError as error:
        raise PairsError(
            f"{path} cannot be listed ({error.strerror}). Check its permissions",
            setting="pairs.source",
        ) from error
    for name in TABLES:
        if name in own:
            return [own[name]]
    folder = walk(path, error=PairsError)
    by_suffix = {suffix: folder.of_type((suffix,)) for suffix in SUFFIXES}
    kind = next((suffix for suffix, files in by_suffix.items() if files), None)
    if kind is None:
        raise PairsError(
            f"{path} holds no table ({', '.join(SUFFIXES)}). Name a folder that has one",
            setting="pairs.source",
        )
    folder.leave_out(folder.of_type(set(SUFFIXES) - {kind}), f"beside {kind}, which is read")
    files = keep_training_files(folder, by_suffix[kind])
    folder.report()
    return files


def rows(source: str | Path, *, start: int = 0, columns: Collection[str] = ()) -> Iterator[Row]:
    """Yield the rows of a source, beginning with row `start`.

    Args:
        columns: names beside those of the layouts that columns get, in whatever case the table writes them.

    Raises:
        PairsError: the source has no table, or a whole table cannot be read.
    """
    number, names = 0, {name.lower(): name for name in (*COLUMNS, *columns)}
    exact = {*COLUMNS, *columns}
    for file in tables(source):
        for row in read_rows(file, skip=start - number, error=PairsError):
            number += 1
            if row is not None:
                yield row if exact.issuperset(row.columns) else _renamed(row, names, exact)


def _renamed(row: Row, names: dict[str, str], exact: set[str]) -> Row:
    """Return a row with its columns renamed where they differ from names in case only."""
    columns = {}
    for name, value in row.columns.items():
        plain = names.get(str(name).strip().lower(), name)
        columns[name if name in exact or plain in row.columns else plain] = value
    return replace(row, columns=columns)
