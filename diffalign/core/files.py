"""Files that an interruption leaves whole, and folders that only the suite's own leftovers make look used."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.core.errors import UsageError, explain

LOCK = ".lock"
"""The file of a folder that `diffalign.core.locks` locks."""
_OWN = re.compile(r"\.\d+\..+|\.writing-\d+")
"""Hidden names of what is being written, of files and folders."""


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


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file in UTF-8, aside and renamed; `durable`: a power cut leaves it whole, too."""
    with aside(path) as file:
        file.write_text(text, encoding="utf-8")
        if durable:
            sync(file)


def contents(folder: Path) -> list[Path]:
    """Return what a folder holds, without the lock and without what a killed process was writing."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.name != LOCK and not _OWN.fullmatch(p.name)]


def remove_stale(folder: Path) -> None:
    """Remove what killed processes were writing. Only for who holds the folder's lock: others may be writing still."""
    for path in folder.iterdir():
        if _OWN.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk, so that a power cut leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(path: str | Path, *, setting: str = "output_dir", folder: bool = True) -> None:
    """Check that a folder (or a file) can be written, before anything heavy is loaded. Nothing is left behind.

    Args:
        setting: names the path in the error.
        folder: False for the path of a file.

    Raises:
        UsageError: the path lies below a file, is a file where a folder is due (or the reverse), or may not be written.
    """
    try:
        place = Path(os.path.abspath(path))
        if folder and place.exists() and not place.is_dir():
            raise UsageError(f"{setting}: {path} is a file. Choose a folder")
        if not folder and place.is_dir():
            raise UsageError(f"{setting}: {path} is a folder. Choose a file")
        place = place if folder else place.parent
        there = next(p for p in (place, *place.parents) if os.path.lexists(p))
        if not there.is_dir():
            raise UsageError(f"{setting}: {there} is a file, so {path} cannot be made below it")
        with tempfile.NamedTemporaryFile(dir=there, prefix=f".{os.getpid()}."):
            pass
    except OSError as error:
        raise UsageError(
            f"{setting}: {path} cannot be written. {explain(error) or error}"
        ) from error
