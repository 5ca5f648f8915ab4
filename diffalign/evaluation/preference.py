"""Which of two sets of images is preferred, pair by pair, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.data.images import CaptionedImage
from diffalign.errors import UserError

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
    _, group = np.unique(np.array(prompts, dtype=object)[valid].astype(str), return_inverse=True)
    total, count = np.bincount(group, weights=wins), np.bincount(group)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), size=RESAMPLES)
    rates = (drawn @ total) / (drawn @ count)
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return WinRate(
        rate=float(wins.mean()),
        low=float(low),
        high=float(high),
        difference=float((a - b).mean()),
        pairs=len(a),
        ties=int((a == b).sum()),
    )


def pair(
    a: Sequence[CaptionedImage], b: Sequence[CaptionedImage], folders: tuple[Path, Path]
) -> list[tuple[int, int]]:
    """Numbers of the images with the same name in both folders, whose prompts must agree.

    Raises:
        PairError: none has, or the same name stands for two prompts.
    """
    names = [
        {image.path.relative_to(folder): i for i, image in enumerate(images)}
        for images, folder in zip((a, b), folders, strict=True)
    ]
    found = []
    for name, i in names[0].items():
        j = names[1].get(name)
        if j is None:
            continue
        if a[i].prompt.text != b[j].prompt.text:
            raise PairError(
                f"{name} shows {a[i].prompt.text!r} in one folder and {b[j].prompt.text!r} in the other"
            )
        found.append((i, j))
    if not found:
        raise PairError(f"{folders[0]} and {folders[1]} have no image of the same name")
    return found
