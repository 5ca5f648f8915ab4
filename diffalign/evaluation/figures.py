"""Figures as text: numbers, intervals with their verdicts, rows and times, the same in terminal and page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.evaluation.intervals import too_few, verdict

CORRECT = "/correct"
"""Suffix of the detail that says whether an image is correct."""
NOISE = "within noise"


def number(value: float, *, sign: bool = False) -> str:
    """Return a number with three significant digits. Use powers of ten where it is tiny or huge."""
    plus = "+" if sign else ""
    if not math.isfinite(value):
        return f"{value:{plus}}"
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".partition("e")[2])
    if not -5 < exponent < 7:
        return f"{value:{plus}.2e}"
    return f"{value:{plus}.{max(0, 2 - exponent)}f}"


def between(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Return an interval as text."""
    if low is None or high is None:
        return "unknown"
    return f"{number(low, sign=sign)} to {number(high, sign=sign)}"


def told(
    low: float | None, high: float | None, *, n: int, prompts: int, centre: float = 0.0
) -> tuple[str, str]:
    """Return an interval as text, and "within noise" where the interval holds `centre`.

    Too few prompts have no interval: the text says so, and how many there are.
    """
    shortage = too_few(n, prompts)
    if shortage or low is None or high is None:
        return shortage or "unknown", ""
    noise = verdict(low, high, n=n, prompts=prompts, centre=centre) == "noise"
    return between(low, high, sign=centre == 0), NOISE if noise else ""


def score_rows(sides: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, str]]:
    """Return the title of each row of `tasks` and `means` that all sides have.

    A quantity has one row. A single reward is the sum of the rewards, too, and the mean over equally large tasks is
    also the mean over images.
    """
    titles = {
        part: {
            name: name for name in sides[-1].get(part, {}) if all(name in s[part] for s in sides)
        }
        for part in ("tasks", "means")
    }
    tasks, means = titles["tasks"], titles["means"]

    def equal(part: str, name: str, other: str) -> bool:
        return all(math.isclose(s[part][name], s["means"][other], rel_tol=1e-6) for s in sides)

    for name in list(means):
        if name.endswith(CORRECT) and "overall" in tasks:
            if equal("tasks", "overall", name):
                del means[name]
            else:
                tasks["overall"] = "overall (mean over tasks)"
                means[name] = f"{name} (mean over images)"
    details = [name for name in means if name != "reward" and not name.startswith("reward ")]
    single = [name for name in details if "/" not in name]
    if "reward" in means and len(single) == 1 and equal("means", "reward", single[0]):
        del means[single[0]]
        means["reward"] = f"reward ({single[0]})"
    return titles


def times_told(summary: Mapping[str, Any]) -> str:
    """Return how long a run took, in a line."""
    trained, resumed = summary["training_seconds"], summary.get("resumed_after", 0)
    total = f"{summary['seconds']:.0f} s with its evaluations"
    if resumed:
        return (
            f"training {trained:.0f} s in all sittings; this one, after update {resumed}, {total}"
        )
    return f"training {trained:.0f} s, in all {total}"
