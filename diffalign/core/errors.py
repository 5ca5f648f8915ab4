"""Errors that a user can resolve.

The command line prints them as one line, without a traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exceeded quota."""
ADVICE = {
    errno.EACCES: "Choose a place that you may read and write, or change its permissions",
    errno.EPERM: "Choose a place that you may read and write, or change its permissions",
    errno.EROFS: "Choose a folder on a file system that can be written",
    errno.ENOTDIR: "A part of that path is a file; choose another path",
    errno.EISDIR: "That is a folder; name a file",
    errno.EEXIST: "Choose another path, or remove what is there",
    errno.ENOENT: "Check the path",
    errno.ENAMETOOLONG: "Choose a shorter path",
    errno.ELOOP: "A link of that path leads back to itself",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Raise the limit of open files (ulimit -n)",
    errno.EIO: "Check the disk",
    errno.ESTALE: "The network file system has lost that file; check the mount",
    errno.ENOTCONN: "The network file system is gone; check the mount",
    errno.ETIMEDOUT: "Check the network, or the mount",
}
"""Advice for each error number of the operating system."""
MEMORY_ADVICE = (
    "Use smaller batches, a smaller model (`diffalign quantize`), or a machine with more memory"
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|"
    r"ALLOC_FAILED|unable to allocate|bad_alloc|OutOfMemory",
    re.IGNORECASE,
)
_PEER = re.compile(
    r"timed out waiting|connection (closed|reset) by peer|connect(ion)? timeout|"
    r"watchdog caught collective|wait timeout|broken pipe|gloo.*(timeout|timed out)",
    re.IGNORECASE,
)


class UserError(Exception):
    """Base of every error whose message tells the user all that is needed.

    Args:
        message: whole sentences: what is wrong, and what to do.
        setting: setting or argument that the error is about; the text of the error begins with it.
        value: value of the setting, which then follows it.
    """

    exit_code = 2
    """Exit status of a command that ends with the error."""

    def __init__(
        self, message: str = "", *, setting: str | None = None, value: object = None
    ) -> None:
        place = setting if value is None else f"{setting}={value}"
        super().__init__(message if setting is None else f"{place}: {message}")
        self.setting = setting
        # without the setting, for callers that know it by another name
        self.message = message


class UsageError(UserError, ValueError):
    """Settings or arguments that conflict with each other, the model or the files."""


class ReportedError(UserError, RuntimeError):
    """Error that another process of the launch reports, so that this process prints nothing."""


def one_line(error: BaseException, *, limit: int | None = None) -> str:
    """Return an error's text in one line. Return its class's name if it has no text.

    Args:
        limit: largest number of characters.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text. Return its class's name if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explain(error: BaseException, *, memory: str = MEMORY_ADVICE) -> str | None:
    """Return one line, with advice, for an error of the machine or the network.

    Return None for a fault of the program, and for errors of the suite, whose own message is complete.

    Args:
        memory: advice for memory that ran out, a sentence without its full stop.
    """
    for part in chain(error):
        if _is_out_of_memory(part):
            text = _first_sentence(part)
            named = text if "out of memory" in text.lower() else f"out of memory: {text}"
            return f"{named}. {memory}"
        if type(part).__name__.startswith("Dist") and _PEER.search(str(part)):
            return _of_peer(part)
        if isinstance(part, RuntimeError) and "gloo" in str(part) and _PEER.search(str(part)):
            return _of_peer(part)
        if (number := _full(part)) is not None:
            return f"{_named(os.strerror(number), part)}. Free space"
        if isinstance(part, OSError):
            return _of_system(part)
    return None


def full_disk(error: BaseException | None) -> str | None:
    """Return one line if a full disk caused an error.

    Return None for every other cause, and for errors of the suite, whose own message is complete.
    """
    for part in chain(error):
        if (number := _full(part)) is not None:
            return _named(os.strerror(number), part)
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """Return True if a device or a machine without free memory caused an error."""
    return any(_is_out_of_memory(part) for part in chain(error))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, up to the first error of the suite."""
    while error is not None and not isinstance(error, UserError):
        yield error
        error = error.__cause__ or error.__context__


def _full(error: BaseException) -> int | None:
    for number in FULL:
        # safetensors puts the number into the text only
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            return number
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error that reports exhausted memory."""
    # torch's errors are recognised by name and text, because this module does not import torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _first_sentence(error: BaseException) -> str:
    """Return the first two sentences of torch's text: the requested size, and the device."""
    text = one_line(error)
    text = re.sub(r"^\[enforce fail at [^\]]*\][^.]*?\. ", "", text)
    return ". ".join(text.split(". ")[:2]).rstrip(".")


def _of_peer(error: BaseException) -> str:
    return (
        f"another process of this launch does not answer ({_first_sentence(error)}). Look for its message above; the "
        "same command goes on from the last checkpoint"
    )


def _of_system(error: OSError) -> str:
    if error.errno is None:  # of libraries: requests, Pillow, transformers
        return one_line(error)
    if error.errno == errno.ENOENT and error.filename is None:
        return "the current directory does not exist any more. Change to one that does"
    text = _named(error.strerror or os.strerror(error.errno), error)
    advice = ADVICE.get(error.errno)
    return f"{text}. {advice}" if advice else text


def _named(text: str, error: BaseException) -> str:
    file = getattr(error, "filename", None)
    return f"{text}: {file}" if file else text
