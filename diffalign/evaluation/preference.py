"""Which of two sets of images is preferred, pair by pair, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.core.errors import UserError
from diffalign.data.images import CaptionedImage

RESAMPLES = 10_000


class PairError(UserError, ValueError):
    """Two folders that have nothing to compare."""


@dataclass(frozen=True)
class WinRate:
    """Share of pairs that A wins, a tie being half a win; `low` and `high` bound its confidence interval; `difference`
    is the mean of A's reward less B's."""

    rate: float
    low: float
    high: float
    difference: float
    pairs: int
    ties: int


def win_rate(
    a: np.ndarray,
    b: np.ndarray,
    prompts: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate | None:
    """Of N pairs of rewards (N,); pairs with a NaN are left out, None where none is left.

    The interval is a bootstrap over prompts: images of one prompt are no independent evidence.
    """
    valid = np.isfinite(a) & np.isfinite(b)
    if not valid.any():
        return None
    a, b = a[valid].astype(np.float64), b[valid].astype(np.float64)
    wins = (a > b) + 0.5 * (a == b)
    asked = [p for p, kept in zip(prompts, valid, strict=True) if kept]
    low, high = interval(wins, asked, confidence=confidence, seed=seed)
    return WinRate(
        rate=float(wins.mean()),
        low=low,
        high=high,
        difference=float((a - b).mean()),
        pairs=len(a),
        ties=int((a == b).sum()),
    )


def interval(
    values: np.ndarray, prompts: Sequence[str], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Of the mean of N values (N,), by a bootstrap over their prompts."""
    _, group = np.unique(np.array(prompts, dtype=object).astype(str), return_inverse=True)
    total, count = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    even = np.full(len(count), 1 / len(count))
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):  # one at a time: with many prompts a table of all would not fit
        drawn = rng.multinomial(len(count), even)
        means[i] = (drawn @ total) / (drawn @ count)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def by_name(images: Sequence[CaptionedImage], folder: Path) -> dict[str, CaptionedImage]:
    """Images by their name within the folder."""
    return {image.path.relative_to(folder).as_posix(): image for image in images}


def shared_names(sides: Sequence[Mapping[str, CaptionedImage]]) -> list[str]:
    """Names that all sides have, of images of the same prompt.

    Raises:
        PairError: there is none, or a name stands for two prompts.
    """
    names = [name for name in sides[0] if all(name in side for side in sides)]
    if not names:
        raise PairError("the folders have no image of the same name")
    for name in names:
        prompts = list(dict.fromkeys(side[name].prompt.text for side in sides))
        if len(prompts) > 1:
            raise PairError(
                f"{name} shows {prompts[0]!r} in one folder and {prompts[1]!r} in another"
            )
    return names
