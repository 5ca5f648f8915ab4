"""Win rates of one set of images against another, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.core.errors import UserError
from diffalign.data.images import CaptionedImage
from diffalign.evaluation.intervals import bootstrap, units, verdict, wilson


class PairError(UserError, ValueError):
    """Two folders that have nothing to compare."""


@dataclass(frozen=True)
class WinRate:
    """Share of pairs that A wins. A tie is half a win.

    The bounds `low` and `high` bound its confidence interval; `difference` is the mean of A's reward less B's.
    """

    rate: float
    low: float
    high: float
    difference: float
    pairs: int
    ties: int
    prompts: int

    @property
    def within_noise(self) -> bool:
        """True where the pairs do not show which side is preferred."""
        word = verdict(self.low, self.high, n=self.pairs, prompts=self.prompts, centre=0.5)
        return word == "noise"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, and whether the rate is within noise."""
        return {**vars(self), "within_noise": self.within_noise}


def win_rate(
    a: np.ndarray,
    b: np.ndarray,
    prompts: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate | None:
    """Return how often A's reward (N,) beats B's.

    Pairs with a NaN are left out. Return None where no pair is left. The interval is a bootstrap over prompts: images
    of one prompt are no independent evidence. Where one side wins every pair, no resample differs, and the interval
    is Wilson's for as many trials as there are prompts.
    """
    valid = np.isfinite(a) & np.isfinite(b)
    if not valid.any():
        return None
    a, b = a[valid].astype(np.float64), b[valid].astype(np.float64)
    wins = (a > b) + 0.5 * (a == b)
    texts = [p for p, is_valid in zip(prompts, valid, strict=True) if is_valid]
    low, high = bootstrap(wins, texts, confidence=confidence, seed=seed)
    prompts_left = len(set(texts))
    if wins.min() == wins.max() != 0.5:
        trials = units(len(wins), prompts_left)
        low, high = wilson(float(wins.mean()), trials, confidence=confidence)
    return WinRate(
        rate=float(wins.mean()),
        low=low,
        high=high,
        difference=float((a - b).mean()),
        pairs=len(a),
        ties=int((a == b).sum()),
        prompts=prompts_left,
    )


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
