"""Q-Sched's published grid of 50 x 50 candidates against searches with a tenth of them.

The best of 2,500 candidates on a few images is partly luck, so that as good a value on these images is half of the
answer: what both searches chose is drawn for other images, too, both with the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from diffalign.data.prompts import Prompt
from diffalign.evaluation.intervals import bootstrap
from diffalign.evaluation.score import Score
from diffalign.pipelines.base import TextToImageModel
from diffalign.tuning.evaluator import Drawing
from diffalign.tuning.objective import Objective
from diffalign.tuning.tune import Search, Settings, score_unseen, search

GRID = "grid"
RIVALS = ("cma", "ramp")
"""On all factors, and on the grid's two numbers."""


def against_grid(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    *,
    side: int,
) -> dict[str, Any]:
    """One seed: the best of `side` x `side` candidates, and of a tenth as many that each rival tries.

    Args:
        prompts: to search with.
        held_out: what no search sees.

    Returns:
        For each search the rows of the network's forwards, the best `value` on the images it saw, and the mean gain on
        held-out images with its 95 % interval over prompts. For a rival also the rows after which its best so far was
        as good as the grid's best, how many times fewer these are, and how much more its choice gains on held-out
        images.
    """
    budgets = {GRID: side**2, **dict.fromkeys(RIVALS, side**2 // 10)}
    results = {
        engine: search(
            model, prompts, score, replace(settings, engine=engine, budget=budget), drawing
        )
        for engine, budget in budgets.items()
    }
    chosen = [r.best for r in results.values()]
    base, *scores = score_unseen(model, held_out, score, settings, drawing, chosen)
    objective = Objective(settings.objective, base)
    gains = [objective.per_image(s) for s in scores]
    texts = [p.text for p in held_out]
    found: dict[str, Any] = {
        "steps": drawing.num_inference_steps,
        "images": len(prompts),
        "held_out": len(held_out),
    }
    for (engine, result), gain in zip(results.items(), gains, strict=True):
        row = {
            "rows": result.network_rows,
            "value": round(result.value, 4),
            "best": [round(v, 6) for v in result.best.vector],
            "held_out_value": _mean(gain, texts),
        }
        if engine != GRID:
            row |= matched(result, results[GRID])
            row["held_out_more"] = _mean(gain - gains[0], texts)
        found[engine] = row
    return found


def matched(result: Search, grid: Search) -> dict[str, Any]:
    """After how many rows of the network a search had found as good a value as the grid's best."""
    rows = next((h["rows"] for h in result.history if h["value"] >= grid.value), None)
    return {"rows_to_match": rows, "ratio": round(grid.network_rows / rows, 2) if rows else None}


def _mean(gains: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """With its 95 % bootstrap interval over prompts."""
    valid = np.isfinite(gains)
    low, high = bootstrap(gains[valid], [p for p, kept in zip(prompts, valid, strict=True) if kept])
    return {
        name: round(float(v), 4)
        for name, v in (("mean", gains[valid].mean()), ("low", low), ("high", high))
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each rival over students and seeds: how many matched the grid, the median ratio of those, and how many chose
    what is worse on held-out images, so that the interval says so."""
    table: dict[str, Any] = {}
    for rival in RIVALS:
        ratios = [f[rival]["ratio"] for f in found if f[rival]["ratio"] is not None]
        table[rival] = {
            "ratio": median(ratios) if ratios else None,
            "matched": f"{len(ratios)} of {len(found)}",
            "worse_on_held_out": sum(f[rival]["held_out_more"]["high"] < 0 for f in found),
        }
    return table
