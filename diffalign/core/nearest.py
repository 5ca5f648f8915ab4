"""Hints for misspelt names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

FEW = 20
"""Largest number of names that a message lists when none is close."""
SHORTEST = 3
"""Fewest letters of a name that is looked up as a word inside longer names."""


def closest(name: str, valid: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the valid name that is closest to `name`.

    The closest name is the one with the most similar spelling, else the shortest that contains `name` as a word.
    Return None if there is neither.
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if close:
        return close[0]
    words = [n for n in names if len(name) >= SHORTEST and name in re.split(r"[^a-z0-9]+|_", n)]
    return min(words, key=len) if words else None


def nearest(name: str, valid: Iterable[str], *, otherwise: str | None = None) -> str:
    """Return a hint to append to a message: the closest valid name, if there is one.

    Args:
        otherwise: hint if no name is close. None lists the valid names, if they are few.
    """
    names = list(valid)
    close = closest(name, names)
    if close is not None:
        return f"; did you mean {close!r}?"
    if otherwise is None and len(names) <= FEW:
        otherwise = f"valid are {', '.join(sorted(names))}"
    return f"; {otherwise}" if otherwise else ""
