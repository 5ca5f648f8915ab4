"""Readers of scores in a judge's text, as pure functions: lists in tags, lines "name: number", 0 or 1.

A text without the scores that were asked for gives None. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_LIST = re.compile(r"<score>\s*\[([^\]]*)\]\s*</score>", re.IGNORECASE)
_NUMBER = r"[-+]?\d+(?:\.\d+)?"


def answer_of(text: str) -> str:
    """Return a text without the thoughts before it."""
    return _THOUGHT.sub("", text)


def tagged_list(text: str, count: int) -> list[int] | None:
    """Return the 0/1 scores of the last `<score>[...]</score>`, or None.

    Args:
        count: number of scores that there must be.
    """
    lists = _LIST.findall(answer_of(text))
    if not lists:
        return None
    parts = [part.strip().strip("'\"") for part in lists[-1].split(",")]
    if len(parts) != count or not all(part in ("0", "1") for part in parts):
        return None
    return [int(part) for part in parts]


def named_number(text: str, name: str, low: float, high: float) -> float | None:
    """Return the number on the last line that begins with a name, or None.

    The line may have emphasis, a range in brackets and a full-width colon, as in "**Style Score (1-5)：** 3".
    """
    pattern = rf"^[\s*#\-\d.]*{re.escape(name)}\s*(?:\([^)]*\))?\s*\**\s*[:：=]\s*\**\s*({_NUMBER})"
    lines = re.findall(pattern, answer_of(text), re.IGNORECASE | re.MULTILINE)
    if not lines:
        return None
    value = float(lines[-1])
    return value if low <= value <= high else None


def section_number(
    text: str, heading: str, headings: Sequence[str], low: float, high: float
) -> float | None:
    """Return the score below a heading, or None for N/A and for none.

    Args:
        headings: all headings, the next of which ends the section.
    """
    body = answer_of(text)
    starts = list(re.finditer(re.escape(heading), body, re.IGNORECASE))
    if not starts:
        return None
    section = body[starts[-1].end() :]
    for other in headings:
        if other != heading:
            section = re.split(re.escape(other), section, maxsplit=1, flags=re.IGNORECASE)[0]
    return named_number(section, "score", low, high)
