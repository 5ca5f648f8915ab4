"""Console output of a command: its own lines, its progress bars, and muting of other libraries.

Only the command line mutes other libraries (`quiet`). Code that imports diffalign as a library sees all messages.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from diffalign.core.files import MESSAGES

OWN = "diffalign"
"""Name of the suite's logger, whose warnings are always shown."""
KEPT = 2000
"""Largest number of lines of other libraries that are kept for the log file."""


class _Messages(io.TextIOBase):
    """Replacement for stderr that stores complete lines and drops redrawn progress bars."""

    def __init__(self, shown: TextIO) -> None:
        self.shown = shown
        self.active = True
        self.lines: list[str] = []
        self._rest = ""

    def write(self, text: str) -> int:
        """Store a text, or write it to the present stderr once the command is over."""
        # loggers hold on to their stream, so that they write here after the command
        if not self.active:
            return sys.stderr.write(text) if sys.stderr is not self else len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        # a bar redraws its line behind a carriage return
        self.lines += [line for line in lines if line.strip() and "\r" not in line]
        del self.lines[:-KEPT]
        return len(text)

    def flush(self) -> None:
        """Do nothing: the lines are written to the log file at the end."""

    def fileno(self) -> int:
        """Return the descriptor of the stream behind this one, for the output of child processes."""
        return self.shown.fileno()

    def isatty(self) -> bool:
        """Return False, so that other libraries draw no progress bars."""
        return False


_muted: list[_Messages] = []
"""Streams that replace stderr at present, the innermost last."""


def stderr() -> TextIO:
    """Return the stream that the user reads, even while other libraries are muted."""
    return _muted[-1].shown if _muted else sys.stderr


def messages() -> list[str]:
    """Return the lines that other libraries wrote since `quiet` began."""
    return list(_muted[-1].lines) if _muted else []


def write_messages(folder: Path) -> None:
    """Append the muted lines to `messages.log` in a folder, if the folder exists.

    The caller must hold the folder's lock: another run could own the folder.
    """
    lines = messages()
    if lines and folder.is_dir():
        with (folder / MESSAGES).open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


@contextmanager
def quiet(*, verbose: bool = False) -> Iterator[None]:
    """Show only the suite's own messages in this block; show all with `verbose`."""
    if verbose:
        yield
        return
    stream = _Messages(sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    own, threads = logging.getLogger(OWN), threading.excepthook
    _muted.append(stream)
    own.addHandler(handler)
    sys.stderr = stream
    threading.excepthook = _show_thread_error
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.stderr = stream.shown
        stream.active = False
        threading.excepthook = threads
        own.removeHandler(handler)
        _muted.remove(stream)


def _show_thread_error(error: threading.ExceptHookArgs) -> None:
    """Print the error that ended a thread, which would go unnoticed while stderr is muted."""
    if error.exc_type is not SystemExit:
        name = error.thread.name if error.thread else "a thread"
        print(f"{name} failed: {error.exc_type.__name__}: {error.exc_value}", file=stderr())


def progress(
    desc: str, total: int | None, *, unit: str = "image", **options: Any
) -> tqdm[NoReturn]:
    """Return a progress bar that shows the remaining time.

    Only the first process of a launch shows it.
    """
    first = os.environ.get("RANK", "0") == "0"
    options = {"mininterval": 0.5 if stderr().isatty() else 10.0, "disable": not first, **options}
    return tqdm(desc=desc, total=total, unit=unit, file=stderr(), dynamic_ncols=True, **options)


def say(text: str) -> None:
    """Print a line above the progress bars on the screen."""
    with tqdm.external_write_mode(file=stderr()):
        print(text)


@contextmanager
def steps(desc: str, names: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Yield a function that moves a progress bar to the next of the named steps."""
    bar = progress(desc, len(names), unit="step")
    bar.set_postfix_str(names[0])

    def advance() -> None:
        bar.update()
        done = int(bar.n)
        bar.set_postfix_str(names[done] if done < len(names) else "")

    try:
        yield advance
    finally:
        bar.close()


@contextmanager
def counting(desc: str, *, unit: str = "image") -> Iterator[Callable[[int, int], None]]:
    """Yield a function `(done, total)` that draws a progress bar at `done` of `total`."""
    bar: tqdm[NoReturn] | None = None
    started = time.time()

    def advance(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = progress(desc, total, unit=unit)
            # the first call may follow the first batch, whose time belongs to the estimate
            if done and not bar.disable:
                bar.start_t = started
        bar.update(done - bar.n)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()
