"""Compare Q-Sched's published grid of 50 x 50 candidates with searches of a tenth.

The best of 2,500 candidates on a few images is partly chance, so an equally good value on these images is half of the
answer. The results of all searches are therefore also scored on held-out images, from the same noise.
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
from diffalign.pipelines.drawing import Drawing
from diffalign.tuning.objective import Objective
from diffalign.tuning.tune import Search, Settings, score_unseen, search

GRID = "grid"
RIVALS = ("cma", "ramp")
"""Engines that are compared with the grid: one on all factors, one on the grid's two numbers."""


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
    """Compare a grid search with each rival's search.

    The grid has `side` x `side` candidates; a rival tries a tenth as many.

    Args:
        prompts: prompts of the searches.
        held_out: prompts that no search sees.

    Returns:
        For each search: the denoiser rows (`rows`), the best `value` on the search images, and the mean gain on
            held-out images with its 95 % interval over prompts. For a rival also: the rows until its best value
            matches the grid's, the ratio of the grid's rows to these, and its gain over the grid's result on held-out
            images.
    """
    budgets = {GRID: side**2, **dict.fromkeys(RIVALS, side**2 // 10)}
    results = {
        engine: search(
            model, prompts, score, replace(settings, engine=engine, budget=budget), drawing
        )
        for engine, budget in budgets.items()
    }
    candidates = [r.best for r in results.values()]
    base, *scores = score_unseen(model, held_out, score, settings, drawing, candidates)
    objective = Objective(settings.objective, base)
    gains = [objective.per_image(s) for s in scores]
    texts = [p.text for p in held_out]
    result: dict[str, Any] = {
        "steps": drawing.num_inference_steps,
        "images": len(prompts),
        "held_out": len(held_out),
    }
    for (engine, run), gain in zip(results.items(), gains, strict=True):
        row = {
            "rows": run.network_rows,
            "value": round(run.value, 4),
            "best": [round(v, 6) for v in run.best.vector],
            "held_out_value": _mean(gain, texts),
        }
        if engine != GRID:
            row |= matched(run, results[GRID])
            row["held_out_more"] = _mean(gain - gains[0], texts)
        result[engine] = row
    return result


def matched(result: Search, grid: Search) -> dict[str, Any]:
    """Return the denoiser rows after which a search matches the grid's best value."""
    rows = next((h["rows"] for h in result.history if h["value"] >= grid.value), None)
    return {"rows_to_match": rows, "ratio": round(grid.network_rows / rows, 2) if rows else None}


def _mean(gains: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Return the mean gain with its 95 % bootstrap interval over prompts."""
    valid = np.isfinite(gains)
    valid_prompts = [p for p, is_valid in zip(prompts, valid, strict=True) if is_valid]
    low, high = bootstrap(gains[valid], valid_prompts)
    return {
        name: round(float(v), 4)
        for name, v in (("mean", gains[valid].mean()), ("low", low), ("high", high))
    }


def summary(grids: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize each rival over students and seeds.

    The result has the number of searches that matched the grid, their median ratio, and the number of searches whose
    result is worse than the grid's on held-out images by the interval.
    """
    table: dict[str, Any] = {}
    for rival in RIVALS:
        ratios = [grid[rival]["ratio"] for grid in grids if grid[rival]["ratio"] is not None]
        table[rival] = {
            "ratio": median(ratios) if ratios else None,
            "matched": f"{len(ratios)} of {len(grids)}",
            "worse_on_held_out": sum(grid[rival]["held_out_more"]["high"] < 0 for grid in grids),
        }
    return table
