"""What a search maximises: JAQ, text-image compatibility and image quality on one scale.

The paper's JAQ is TC + k IQ with k = 2 on the raw scores of two rewards, whose scales differ with the pair. Here each
term is a z-score: its mean over the images less that of the schedule as it is, in standard deviations over images of
that schedule. So k means the same for any pair, and 0 is "no better".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffalign.core.errors import UsageError, UserError
from diffalign.schedulers import Coefficients

K = 2.0
PRESETS: dict[str, dict[str, float]] = {
    "jaq": {"clip_score": 1.0, "hpsv2.1": K},
    "jaq-lcm": {"clip_score": 1.0, "clip_iqa": K},
    # with k = 2 the searches on Shapes sold obedience for flatness: see docs/qsched.md
    "jaq-shapes": {"verifier": 1.0, "flatness": 0.25},
}
"""`jaq-lcm` is the paper's for LCM and PCM. `jaq` has the second term of its script for SDXL-Turbo and FLUX, HPSv2.1,
and CLIPScore instead of the first, AQ-Map (docs/qsched.md)."""
Scores = Mapping[str, np.ndarray]
"""Name of a term to its values (P,) for P images."""


class ObjectiveError(UserError, RuntimeError):
    """Scores that leave nothing to maximise."""


def parse(text: str) -> dict[str, float]:
    """A preset's name, or "reward=weight,reward=weight"; a bare name has weight 1.

    Raises:
        UsageError: a weight is no finite number.
    """
    if text in PRESETS:
        return dict(PRESETS[text])
    found = {}
    for part in text.split(","):
        name, given, weight = part.strip().partition("=")
        try:
            value = float(weight) if given else 1.0
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise UsageError(
                f"objective: {part!r} is no reward=weight; expected one of {', '.join(PRESETS)}, or for instance "
                "clip_score=1,pickscore=2"
            )
        found[name] = value
    return found


@dataclass(frozen=True)
class Objective:
    """J(c) = sum of weight x (mean(c) - mean(1)) / sd(1) - penalty x |c - 1|^2, over images that both have.

    `base` are the scores of the schedule as it is. A term that is the same for all of them cannot be scaled, and one of
    weight 0 is only watched.
    """

    weights: Mapping[str, float]
    base: Scores
    penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            values = self.base[name]
            if not np.isfinite(values).any():
                raise ObjectiveError(f"objective: {name} gave no score for any calibration image")
            if weight and not np.nanstd(values) > 0:
                raise ObjectiveError(
                    f"objective: {name} is {np.nanmean(values):g} for every calibration image; use more or other "
                    "prompts"
                )

    def per_image(self, scores: Scores) -> np.ndarray:
        """(P,) gains over the schedule as it is, NaN where a term has no score."""
        total = np.zeros(len(next(iter(self.base.values()))))
        for name, weight in self.weights.items():
            if weight:
                base = self.base[name]
                total = total + weight * (scores[name] - base) / np.nanstd(base)
        return total

    def __call__(self, coefficients: Coefficients, scores: Scores) -> float:
        """J, minus infinity where fewer than half of the images could be scored: no winner by what is missing."""
        gains = self.per_image(scores)
        valid = np.isfinite(gains)
        if valid.sum() < len(gains) / 2:
            return -math.inf
        distance = sum((v - 1) ** 2 for v in coefficients.vector)
        return float(gains[valid].mean()) - self.penalty * distance
