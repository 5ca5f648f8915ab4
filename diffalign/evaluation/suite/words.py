"""Measures of a transcription as pure functions: bags of words, recall, precision, F1, character errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

WORD, CHARACTERS = "word", "characters"
"""Units of a text: words of Latin script, or characters of Chinese."""
_LETTERS = re.compile(r"[^\w]|_")


@dataclass(frozen=True)
class Bag:
    """Units of a text with their counts, and the text without spaces.

    Both are in lower case, with letters and digits only.
    """

    counts: Counter[str]
    plain: str


def bag(text: str, unit: str) -> Bag:
    """Return the units of a text: lower case, letters and digits only."""
    lower = text.lower()
    units = [_LETTERS.sub("", part) for part in lower.split()]
    plain = "".join(units)
    if unit == CHARACTERS:
        units = list(plain)
    return Bag(Counter(u for u in units if u), plain)


@dataclass(frozen=True)
class TextScore:
    """Agreement of a transcription with a target.

    Attributes:
        hits: units of the target that were read.
        target: number of units of the target.
        read: number of units that were read.
        errors: character errors, at most 1.
    """

    hits: int
    target: int
    read: int
    errors: float

    @property
    def recall(self) -> float:
        """Share of the target's units that were read."""
        return self.hits / self.target

    @property
    def precision(self) -> float:
        """Share of the units read that the target has; 0 if nothing was read."""
        return self.hits / self.read if self.read else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of recall and precision."""
        return 2 * self.hits / (self.target + self.read)


def compare_texts(read: str, target: str | Sequence[str], unit: str = WORD) -> TextScore:
    """Return how a transcription agrees with a target, which must not be empty."""
    wanted_text = target if isinstance(target, str) else " ".join(target)
    seen, goal = bag(read, unit), bag(wanted_text, unit)
    hits = sum((seen.counts & goal.counts).values())
    distance = Levenshtein.distance(seen.plain, goal.plain)
    return TextScore(
        hits,
        sum(goal.counts.values()),
        sum(seen.counts.values()),
        min(1.0, distance / max(len(goal.plain), 1)),
    )
