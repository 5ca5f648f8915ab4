"""Locks on folders: one launch at a time writes to a run, a cache or any other folder that is resumed.

The lock is `flock` on a hidden file of the folder. The system releases it when its process ends, however that ends. On
a network file system it holds between machines only where the server supports `flock`; without support there is a
warning and no lock.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffalign.core.errors import UserError
from diffalign.core.files import LOCK, contents, remove_stale

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
OPENING_ATTEMPTS = 50
_held: dict[Path, int] = {}
"""Folders that this process holds, and how many blocks hold each."""


class LockError(UserError, RuntimeError):
    """A folder that another process is writing to."""


@contextmanager
def hold(folder: Path, *, setting: str = "output_dir") -> Iterator[None]:
    """Keep other processes out of a folder until the block ends; blocks of one process may be nested.

    The folder is made if it is missing, and removed again if the block has left nothing in it. Temporary files that a
    killed process left there are removed.

    Args:
        setting: names the folder in the error.

    Raises:
        LockError: another process holds the folder.
        OSError: the folder cannot be made or written to.
    """
    key = Path(os.path.abspath(folder))
    made: list[Path] = []
    descriptor = None
    if key not in _held:
        made = [p for p in (key, *key.parents) if not p.exists()]
        descriptor = _acquire(key, setting)
        remove_stale(key)
    _held[key] = _held.get(key, 0) + 1
    try:
        yield
    finally:
        _held[key] -= 1
        if not _held[key]:
            del _held[key]
            _release(key, descriptor, made)


def _acquire(folder: Path, setting: str) -> int | None:
    """Return the descriptor of the locked file; None where the file system has no locks."""
    for _ in range(OPENING_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a holder has just removed its empty folder
            continue
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise LockError(
                f"{folder} is in use by {holder}. Wait until that ends, or choose another {setting}"
            ) from None
        except OSError as error:
            logger.warning(
                "%s: this file system has no locks (%s); start one run only", folder, error
            )
            os.close(descriptor)
            return None
        if _is_current(descriptor, folder / LOCK):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # of a file that its last holder has removed meanwhile
    raise LockError(f"{folder} is being made and removed by another process; start again")


def _is_current(descriptor: int, file: Path) -> bool:
    """Return whether the descriptor is still of the file with this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def _holder(descriptor: int) -> str:
    """Return who holds the lock; it notes that down right after it has the lock."""
    for _ in range(OPENING_ATTEMPTS):
        number, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").partition(" ")
        if number.isdigit():
            here = host.strip() == socket.gethostname()
            return f"process {number}" + ("" if here else f" on {host.strip()}")
        time.sleep(0.01)
    return "another process"


def _release(folder: Path, descriptor: int | None, made: list[Path]) -> None:
    """Remove the lock's file while it is still locked, and the folders that were made for nothing."""
    with suppress(OSError):  # the folder may be gone, or renamed
        if descriptor is None or _is_current(descriptor, folder / LOCK):
            (folder / LOCK).unlink(missing_ok=True)
    if descriptor is not None:
        os.close(descriptor)
    with suppress(OSError):
        for place in made:
            if contents(place):
                break
            place.rmdir()
