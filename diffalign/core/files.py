"""Atomic writing of files and folders, and checks that a path can be written."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign.core.errors import UsageError, explain

LOCK = ".lock"
"""Name of the file in a folder that `diffalign.core.locks` locks."""
MESSAGES = "messages.log"
"""Name of the file in a folder with the messages of other libraries."""
_OWN = re.compile(r"\.\d+\..+|\.writing-\d+")
"""Pattern of the hidden names that files and folders have while they are written."""


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write to, and rename it to `path` at the end.

    The hidden file has the suffix of `path`. It is removed if writing fails.
    """
    hidden = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield hidden
        hidden.replace(path)
    except OSError as error:
        # some system errors, such as that of a full disk, name no file
        error.filename = error.filename or str(path)
        raise
    finally:
        hidden.unlink(missing_ok=True)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill, and rename it to `path` at the end.

    The folder `path` must not exist. The hidden folder is removed if filling fails.
    """
    hidden = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        hidden.mkdir(parents=True)
        yield hidden
        hidden.rename(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file atomically; with `durable` it survives a power cut, too."""
    with aside(path) as file:
        file.write_text(text, encoding="utf-8")
        if durable:
            sync(file)


def write_json_lines(path: Path, rows: Iterable[Any], *, durable: bool = False) -> None:
    """Write one JSON text per row, atomically; with `durable` it survives a power cut, too."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows), durable=durable)


def contents(folder: Path) -> list[Path]:
    """Return the paths in a folder, without the lock, messages and unfinished files.

    Return an empty list for a missing folder.
    """
    if not folder.is_dir():
        return []
    own = (LOCK, MESSAGES)
    return [p for p in folder.iterdir() if p.name not in own and not _OWN.fullmatch(p.name)]


def expand_home(path: str | Path) -> Path:
    """Return a path with the home folder in place of a leading `~` or `~user`.

    Raises:
        UsageError: the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path} names the home folder of an unknown user. Check the name behind ~, or write the whole path"
        ) from error


def remove_stale(folder: Path) -> None:
    """Remove files and folders that killed processes left unfinished.

    The caller must hold the folder's lock, because other processes could still be writing.
    """
    for path in folder.iterdir():
        if _OWN.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(path: str | Path, *, setting: str = "output_dir", folder: bool = True) -> None:
    """Check that a folder (or a file) can be written.

    The check runs before anything heavy is loaded and leaves nothing behind.

    Args:
        setting: names the path in the error.
        folder: False for the path of a file.

    Raises:
        UsageError: the path is below a file, is a file instead of a folder (or the reverse), or cannot be written.
    """
    if not str(path):
        raise UsageError(
            f"must not be empty. Name a {'folder' if folder else 'file'}", setting=setting
        )
    try:
        place = Path(os.path.abspath(path))
        if folder and place.exists() and not place.is_dir():
            raise UsageError(f"{path} is a file. Choose a folder", setting=setting)
        if not folder and place.is_dir():
            raise UsageError(f"{path} is a folder. Choose a file", setting=setting)
        place = place if folder else place.parent
        parent = next(p for p in (place, *place.parents) if os.path.lexists(p))
        if not parent.is_dir():
            raise UsageError(
                f"{parent} is a file, so {path} cannot be made below it", setting=setting
            )
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{os.getpid()}."):
            pass
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written. {explain(error) or error}", setting=setting
        ) from error
