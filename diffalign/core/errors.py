"""Errors that are the user's to mend: the command line shows them as one line, without a traceback."""

from __future__ import annotations

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The disk, or what a user may have of it."""


class UserError(Exception):
    """Base of every error whose message says all that a user needs."""


class UsageError(UserError, ValueError):
    """Settings or arguments that do not fit together, to the model, or to the files that are there."""


def full_disk(error: BaseException | None) -> str | None:
    """One line where an error, or one that it comes from, is that of a full disk; None for every other, and for those
    of the suite, which say for themselves what they mean."""
    while error is not None and not isinstance(error, UserError):
        for number in FULL:
            # safetensors' own errors have the number in their text alone
            if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
                file = getattr(error, "filename", None)
                return os.strerror(number) + (f": {file}" if file else "")
        error = error.__cause__ or error.__context__
    return None
