"""Choice and weights of preference pairs of one prompt's scored images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def choose_pairs(
    scores: Sequence[float], *, pick: str = "best_worst", min_gap: float = 0.0
) -> list[tuple[int, int]]:
    """Return pairs (better, worse) of images whose scores differ by more than `min_gap`.

    Images with a NaN score make no pair. Of two images with equal scores the earlier one ranks first.

    Args:
        scores: scores of one prompt's images.
        pick: "best_worst", at most one pair; "nested", the best with the worst, the second with the second worst and
            so on, each image once; or "all" pairs.
        min_gap: largest difference of scores that makes no pair.
    """
    valid = [i for i, s in enumerate(scores) if math.isfinite(s)]
    order = sorted(valid, key=lambda i: -scores[i])
    if pick == "all":
        pairs = list(combinations(order, 2))
    else:
        nested = [(order[i], order[-1 - i]) for i in range(len(order) // 2)]
        pairs = nested[:1] if pick == "best_worst" else nested
    return [(a, b) for a, b in pairs if scores[a] - scores[b] > max(min_gap, 0.0)]


def rank_weights(scores: Sequence[float], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Return RankDPO's weight of each pair (a, b) of a prompt's images.

    The weight is |G_a - G_b| |1 / D_a - 1 / D_b| with gain G = 2^score - 1 and discount D = log(1 + rank). Scores are
    scaled to 0..1 within the prompt. Pairs with an image at the top of the ranking weigh most. DPO's loss over all
    pairs, with these weights, is RankDPO's loss. Source: Karthik et al. 2024.
    """
    valid = sorted((i for i, s in enumerate(scores) if math.isfinite(s)), key=lambda i: -scores[i])
    discount = {i: 1 / math.log(1 + rank) for rank, i in enumerate(valid, start=1)}
    high, low = scores[valid[0]], scores[valid[-1]]
    gain = {i: 2 ** ((scores[i] - low) / (high - low or 1)) for i in valid}
    return [abs(gain[a] - gain[b]) * abs(discount[a] - discount[b]) for a, b in pairs]
