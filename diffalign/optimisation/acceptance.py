"""Estimates of what a candidate costs in quality, and their comparison with the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt
from diffalign.evaluation.figures import CORRECT
from diffalign.evaluation.intervals import CONFIDENCE, Estimate, bootstrap
from diffalign.optimisation.limits import GENEVAL, PSNR, Limits

HALF_PAIRS = math.sqrt(0.5)
"""Value of two added images that a difference of shares has (Agresti and Min 2005).

A few pairs that agree would look certain without them.
"""
Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """Comparison of one quality with its limit.

    Attributes:
        limit: least value that is accepted.
        estimate: mean over the images, with the interval of a paired bootstrap over prompts.
    """

    limit: float
    estimate: Estimate

    @property
    def accepted(self) -> bool:
        """True if the interval lies above the limit."""
        return self.estimate.low is not None and self.estimate.low >= self.limit

    @property
    def refuted(self) -> bool:
        """True if the interval lies below the limit."""
        return self.estimate.high is not None and self.estimate.high < self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {"limit": self.limit, "accepted": self.accepted, **self.estimate.to_dict()}


def compare(
    limits: Limits,
    own: Values,
    plain: Values,
    prompts: Sequence[Prompt],
    *,
    confidence: float = CONFIDENCE,
) -> dict[str, Verdict]:
    """Return the comparison of each quality that has a limit.

    Args:
        own: values (N,) of a candidate's images by name; `psnr` is among them.
        plain: rewards (N,) of the plain images of the same prompts and seeds.
        prompts: prompt of each image; those of images that are not drawn yet are left out.
        confidence: confidence of the intervals.

    Raises:
        UsageError: a reward has no value for at least half of the pairs of images.
    """
    prompts = prompts[: len(own[PSNR])]
    texts = [p.text for p in prompts]
    verdicts: dict[str, Verdict] = {}
    if limits.psnr is not None:
        verdicts[PSNR] = Verdict(limits.psnr, estimate(own[PSNR], texts, confidence=confidence))
    for name, limit in limits.differences.items():
        column = column_of(name, own)
        difference = own[column] - plain[column]
        _check_scored(name, difference)
        shares = _are_shares(own[column]) and _are_shares(plain[column])
        tasks = [p.task for p in prompts] if name == GENEVAL else None
        mean = estimate(difference, texts, shares=shares, tasks=tasks, confidence=confidence)
        verdicts[name] = Verdict(limit, mean)
    return verdicts


def estimate(
    values: np.ndarray,
    prompts: Sequence[str],
    *,
    shares: bool = False,
    tasks: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Return the mean of values (N,) with its interval.

    The interval is that of a bootstrap over prompts. Values that are no numbers are left out.

    Args:
        shares: the values are differences of shares, which are -1, 0 or 1.
        tasks: task of each value; the mean is then that of the tasks' means.
        confidence: confidence of the interval.
    """
    rows = np.flatnonzero(np.isfinite(values))
    x, texts = values[rows].astype(np.float64), [prompts[int(i)] for i in rows]
    if tasks is not None:
        kinds, index = np.unique(np.array([tasks[int(i)] for i in rows]), return_inverse=True)
        x = x * (len(x) / (len(kinds) * np.bincount(index)[index]))
    value = float(x.mean())
    different = len(set(texts))
    if shares:
        # no prompt is empty but for its number
        x, texts = np.append(x, [HALF_PAIRS, -HALF_PAIRS]), [*texts, "\0+", "\0-"]
    low, high = bootstrap(x, texts, confidence=confidence)
    return Estimate(value, min(low, value), max(high, value), len(rows), different)


def check_power(limits: Limits, prompts: Sequence[Prompt]) -> None:
    """Check that the images can show that a limit is kept.

    Raises:
        UsageError: the interval would reach below a limit even without any difference.
    """
    limit = limits.differences.get(GENEVAL)
    if limit is None:
        return
    texts, tasks = [p.text for p in prompts], [p.task for p in prompts]
    best = estimate(np.zeros(len(prompts)), texts, shares=True, tasks=tasks)
    assert best.low is not None
    if best.low < limit:
        needed = math.ceil(len(prompts) * best.low / min(limit, -1e-9))
        raise UsageError(
            f"{len(prompts)} held-out images cannot show a loss below {-limit:g}: even if all pairs agree, the "
            f"interval reaches {best.low:.4f}. Draw about {needed} (`images_per_task` or `images_per_prompt`), "
            "or allow more.",
            setting="quality",
            value=f"{GENEVAL}>={limit:g}",
        )


def column_of(name: str, values: Values) -> str:
    """Return the column of a quality.

    GenEval's is the one that says which images are correct.

    Raises:
        UsageError: there is no such column.
    """
    if name != GENEVAL and name in values:
        return name
    column = next((c for c in values if c.endswith(CORRECT)), None)
    if name == GENEVAL and column is not None:
        return column
    raise UsageError(
        f"no reward gives this value. Name a reward of {', '.join(sorted(values)) or 'the suite'}.",
        setting="quality",
        value=name,
    )


def _are_shares(values: np.ndarray) -> bool:
    return bool(np.isin(values[np.isfinite(values)], (0.0, 1.0)).all())


def _check_scored(name: str, differences: np.ndarray) -> None:
    scored = int(np.isfinite(differences).sum())
    if scored < max(1, len(differences) / 2):
        raise UsageError(
            f"{scored} of {len(differences)} pairs of images were scored, and at least half are needed. Check the "
            "reward with `diffalign evaluate`.",
            setting="quality",
            value=name,
        )
