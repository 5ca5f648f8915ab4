"""Signals that end a run after its work in progress is finished and saved.

Ctrl-C (SIGINT), SIGTERM (Slurm, Kubernetes, `kill`) and SIGHUP (a closed terminal) are treated alike. Outside of
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
"""Seconds in which a second signal counts as a repetition of the first.

Launchers pass on a signal that the terminal has already sent to all processes.
"""
Handler = Callable[[int, FrameType | None], Any]


class Interrupted(KeyboardInterrupt):
    """Work that a signal ended.

    The message names what was saved and where the same command continues. The class is no `Exception`, so that
    handlers of ordinary errors do not swallow it.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit status that shells report for the signal."""
        return 128 + self.number


def name_of(number: int) -> str:
    """Return the signal's name for messages, such as SIGTERM, or Ctrl-C for SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interruption:
    """Context in which a signal sets `number` instead of ending the process.

    Before the first signal `number` is 0. The block checks it whenever its work can be saved, saves it, and raises
    `Interrupted`. A second signal ends the process at once.

    Args:
        then: message to the user about the first signal, such as "the run is saved when update 3 is done".
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
        """Let a signal leave this inner block at once and continue after it.

        Use it for work that can be left out.
        """
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
        # launchers repeat signals, some of them late, so that a repetition must not end their processes
        if "LOCAL_RANK" not in os.environ:
            time.sleep(SETTLING)
            # the system's default handler acts in the middle of a long kernel, too
            for one in self._before:
                signal.signal(one, signal.SIG_DFL)
        if self._breaks:
            self._breaks = False
            raise _BreakOff


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Raise `Interrupted` as soon as a signal arrives in this block."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = _install(end, SIGNALS)
    try:
        yield
    finally:
        _restore(before)


class _BreakOff(BaseException):
    """Signal that arrived inside a `breaks_off` block."""


def _install(handler: Handler, numbers: tuple[int, ...]) -> dict[int, Any]:
    """Install a handler for these signals, and return the former handlers."""
    # signals that are ignored, as by `nohup`, stay ignored
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
    """Write to the terminal from a signal handler, where `print` is not re-entrant."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())
