"""Errors that are the user's to mend: the command line shows them as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base of every error whose message says all that a user needs."""


class UsageError(UserError, ValueError):
    """Settings or arguments that do not fit together, to the model, or to the files that are there."""
