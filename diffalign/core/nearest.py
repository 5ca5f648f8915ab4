"""The hint that follows a misspelt name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

FEW = 20
"""Names that a message lists where none is close."""
SHORTEST = 3
"""Letters of a name that is looked up as a word of longer names."""


def closest(name: str, valid: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the valid name that is spelt most like `name`, or contains it as a word; None where none is close."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if close:
        return close[0]
    words = [n for n in names if len(name) >= SHORTEST and name in re.split(r"[^a-z0-9]+|_", n)]
    return min(words, key=len) if words else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint to append to a message: the closest valid name, or all of them when they are few."""
    names = list(valid)
    close = closest(name, names)
    if close is not None:
        return f"; did you mean {close!r}?"
    return f"; valid are {', '.join(sorted(names))}" if len(names) <= FEW else ""
