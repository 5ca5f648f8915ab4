"""Signals that end the work: what is in hand is finished and kept first.

Ctrl-C (SIGINT), SIGTERM (Slurm, Kubernetes, `kill`) and SIGHUP (a closed terminal) are answered alike. Outside of
loops that can save, a signal ends the verb at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SETTLING = 1.0
"""Seconds in which another signal is the first one again: a launcher passes on what the terminal has sent already."""
Handler = Callable[[int, FrameType | None], Any]


class Interrupted(KeyboardInterrupt):
    """Work that a signal ended; the message says what is kept and where the same command goes on.

    It is no `Exception`, so that nothing that forgives errors swallows it.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit status that shells give to the signal."""
        return 128 + self.number


def name_of(number: int) -> str:
    """Return the signal's name, as in `kill -l`."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interruption:
    """A block in which signals wait: `number` is that of the first one, 0 without.

    The block asks for `number` whenever its work is whole, keeps it, and raises `Interrupted`. A second signal ends the
    process at once.

    Args:
        then: what happens after the first signal, for the user, such as "the run is saved when update 3 is done".
    """

    def __init__(self, then: str) -> None:
        self.then = then
        self.number = 0
        self._since = 0.0
        self._breaks = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = _install(self._note, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    @contextmanager
    def breaks_off(self) -> Iterator[None]:
        """Let a signal end this inner block at once; what follows the block is done. For work that can be left out."""
        with suppress(_BreakOff):
            try:
                self._breaks = True
                yield
            finally:
                self._breaks = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if time.monotonic() - self._since > SETTLING:
                _die(number)
            return
        self.number, self._since = number, time.monotonic()
        _say(f"{name_of(number)}: {self.then}; a second one ends at once")
        if "LOCAL_RANK" not in os.environ:  # launchers repeat signals, some of them late
            time.sleep(SETTLING)
            for (
                one
            ) in self._before:  # the system's own answer works in the middle of a long kernel, too
                signal.signal(one, signal.SIG_DFL)
        if self._breaks:
            self._breaks = False
            raise _BreakOff


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Raise `Interrupted` in this block as soon as a signal comes, as Ctrl-C does by itself."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = _install(end, SIGNALS)
    try:
        yield
    finally:
        _restore(before)


class _BreakOff(BaseException):
    """Raised in the middle of a block that a signal may break off."""


def _install(handler: Handler, numbers: tuple[int, ...]) -> dict[int, Any]:
    """Handle these signals; return the former handlers. Signals that are ignored (`nohup`) stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {n: signal.getsignal(n) for n in numbers}
    before = {n: h for n, h in before.items() if h is not None and h != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _say(text: str) -> None:
    """Write to the terminal from a signal handler, where `print` may not be entered again."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())
