"""Tables of prompts in benchmarks' files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from diffalign.evaluation.suite.base import SuiteError


def open_table(
    text: str, columns: Sequence[str], place: str, of: str, **options: Any
) -> csv.DictReader[str]:
    """Return a reader of a table's rows.

    Args:
        columns: columns that the table must have.
        place: name of the file in messages.
        of: benchmark with apostrophe, as in "WISE's".
        options: dialect of the table, see `csv.reader`.

    Raises:
        SuiteError: a column is missing; the message names it.
    """
    reader = csv.DictReader(io.StringIO(text), **options)
    present = reader.fieldnames or ()
    missing = [column for column in columns if column not in present]
    if missing:
        raise SuiteError(f"{place} is not {of}: it has no column {', '.join(sorted(missing))}")
    return reader
