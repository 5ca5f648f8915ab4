"""Files that an interruption leaves whole: as they were, or as they are to be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, with its suffix, to write to; it takes the place of `path` once that is done, and is
    gone if it cannot be. An error of the system's that names no file, as of a full disk, names `path` then."""
    hidden = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield hidden
        hidden.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        hidden.unlink(missing_ok=True)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """The same for a folder, which must not be there yet."""
    hidden = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        hidden.mkdir(parents=True)
        yield hidden
        hidden.rename(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, aside and renamed."""
    with aside(path) as file:
        file.write_text(text, encoding="utf-8")
