"""From scored images of one prompt to preference pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

PICKS = ("best_worst", "nested", "all")


def choose_pairs(
    scores: Sequence[float], *, pick: str = "best_worst", min_gap: float = 0.0
) -> list[tuple[int, int]]:
    """(better, worse) numbers of images with different scores, by more than `min_gap`; NaN is no score.

    Args:
        scores: of the images of one prompt.
        pick: "best_worst", at most one pair; "nested", the best with the worst, the second with the second worst and
            so on, each image once; or "all" pairs. Of equal scores the earlier image stands first.
        min_gap: pairs that differ by no more say little.
    """
    valid = [i for i, s in enumerate(scores) if math.isfinite(s)]
    order = sorted(valid, key=lambda i: -scores[i])
    if pick == "all":
        pairs = list(combinations(order, 2))
    else:
        nested = [(order[i], order[-1 - i]) for i in range(len(order) // 2)]
        pairs = nested[:1] if pick == "best_worst" else nested
    return [(a, b) for a, b in pairs if scores[a] - scores[b] > max(min_gap, 0.0)]
