"""Locks on folders: only one launch at a time writes to a run or a cache.

The lock is `flock` on a hidden file of the folder. The system releases it when its process ends for any reason. On a
network file system it works between machines only if the server supports `flock`. Without that support a warning is
logged and nothing is locked.
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
"""Number of blocks in this process that hold each locked folder."""


class LockError(UserError, RuntimeError):
    """A folder that another process is writing to."""


@contextmanager
def hold(folder: Path, *, setting: str = "output_dir") -> Iterator[None]:
    """Lock a folder against other processes until the block ends.

    Blocks of one process may be nested. A missing folder is created, and removed again if the block leaves it empty.
    Temporary files that a killed process left in the folder are removed.

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
    """Return the descriptor of the locked file, or None without support for locks."""
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
        # the last holder has removed the file that this descriptor belongs to
        os.close(descriptor)
    raise LockError(f"{folder} is being made and removed by another process; start again")


def _is_current(descriptor: int, file: Path) -> bool:
    """Return True if the descriptor still belongs to the file with this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def _holder(descriptor: int) -> str:
    """Return a description of the process that holds the lock."""
    # the holder writes its number just after locking, so the file may still be empty
    for _ in range(OPENING_ATTEMPTS):
        number, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").partition(" ")
        if number.isdigit():
            is_local = host.strip() == socket.gethostname()
            return f"process {number}" + ("" if is_local else f" on {host.strip()}")
        time.sleep(0.01)
    return "another process"


def _release(folder: Path, descriptor: int | None, made: list[Path]) -> None:
    """Remove the lock file, then unlock it, then remove folders that stayed empty."""
    # the folder may have been removed or renamed
    with suppress(OSError):
        if descriptor is None or _is_current(descriptor, folder / LOCK):
            (folder / LOCK).unlink(missing_ok=True)
    if descriptor is not None:
        os.close(descriptor)
    with suppress(OSError):
        for place in made:
            if contents(place):
                break
            place.rmdir()
