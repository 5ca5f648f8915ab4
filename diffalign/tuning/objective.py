"""Objectives of a search: JAQ, text-image compatibility and image quality on one scale.

The paper's JAQ is TC + k IQ with k = 2 on the raw scores of two rewards, whose scales differ between pairs. Here each
term is a z-score: its mean over the images minus that of the original schedule, in standard deviations over images of
the original schedule. So k means the same for any pair, and 0 means no gain.
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
    # With k = 2 the searches on Shapes traded prompt following for flatness: see docs/qsched.md.
    "jaq-shapes": {"verifier": 1.0, "flatness": 0.25},
}
"""Named objectives.

The paper uses `jaq-lcm` for LCM and PCM. In `jaq` the second term is HPSv2.1, as in the paper's script for SDXL-Turbo
and FLUX, and the first is CLIPScore instead of AQ-Map (docs/qsched.md).
"""
Scores = Mapping[str, np.ndarray]
"""Values (P,) of P images by name of the term."""


class ObjectiveError(UserError, RuntimeError):
    """Error for scores that leave nothing to maximise."""


def parse(text: str) -> dict[str, float]:
    """Parse a preset's name or "reward=weight,reward=weight". A bare name has weight 1.

    Raises:
        UsageError: a weight is no finite number.
    """
    if text in PRESETS:
        return dict(PRESETS[text])
    weights = {}
    for part in text.split(","):
        name, separator, weight = part.strip().partition("=")
        try:
            value = float(weight) if separator else 1.0
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise UsageError(
                f"objective={text}: {part!r} is not reward=weight. Choose from {', '.join(PRESETS)}, or write for "
                "instance clip_score=1,pickscore=2."
            )
        weights[name] = value
    return weights


@dataclass(frozen=True)
class Objective:
    """Objective J of a search, in standard deviations of the original schedule's scores.

    J(c) = sum of weight x (mean(c) - mean(1)) / sd(1) - penalty x |c - 1|^2. Means are over images that both schedules
    have. The scores of the original schedule are `base`. A term with the same score for all of them cannot be scaled;
    a term of weight 0 is only reported.
    """

    weights: Mapping[str, float]
    base: Scores
    penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            values = self.base[name]
            if not np.isfinite(values).any():
                raise ObjectiveError(
                    f"objective: {name} gave no score for any calibration image. Check the reward with "
                    "`diffalign score`."
                )
            if weight and not np.nanstd(values) > 0:
                raise ObjectiveError(
                    f"objective: {name} is {np.nanmean(values):g} for every calibration image. Use more or other "
                    "prompts."
                )

    def per_image(self, scores: Scores) -> np.ndarray:
        """Return gains (P,) over the original schedule, NaN where a term has no score."""
        total = np.zeros(len(next(iter(self.base.values()))))
        for name, weight in self.weights.items():
            if weight:
                base = self.base[name]
                total = total + weight * (scores[name] - base) / np.nanstd(base)
        return total

    def __call__(self, coefficients: Coefficients, scores: Scores) -> float:
        """Return J, or minus infinity if fewer than half of the images have scores.

        A candidate must not win by what is missing.
        """
        gains = self.per_image(scores)
        valid = np.isfinite(gains)
        if valid.sum() < len(gains) / 2:
            return -math.inf
        distance = sum((v - 1) ** 2 for v in coefficients.vector)
        return float(gains[valid].mean()) - self.penalty * distance
