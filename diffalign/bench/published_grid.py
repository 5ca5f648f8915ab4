"""Q-Sched's published grid of 50 x 50 candidates against searches with a tenth of them, by what other images say.

The best of 2,500 candidates on a few images is partly luck, and another search that misses the luck misses nothing. So
each search's best is drawn for held-out prompts, and so is whatever was best along its way: from where on it was as
good as the grid's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from diffalign.data.prompts import Prompt
from diffalign.evaluation.score import Score
from diffalign.pipelines.base import TextToImageModel
from diffalign.schedulers import Coefficients, QSched
from diffalign.tuning.evaluator import Drawing, Evaluator
from diffalign.tuning.objective import Objective, Scores
from diffalign.tuning.tune import Settings, TuneResult, accept, split, tune

GRID = "grid"
RIVALS = ("cma", "ramp")
"""On all factors, and on the grid's two numbers."""


def against_grid(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    score: Score,
    settings: Settings,
    drawing: Drawing,
    *,
    side: int,
) -> dict[str, Any]:
    """One seed: the best of `side` x `side` candidates, and of a tenth as many that each rival tried.

    Args:
        settings: `held_out` is the share of `prompts` that searches never see.
    """
    results = {
        engine: tune(
            model, prompts, score, replace(settings, engine=engine, budget=budget), drawing
        )
        for engine, budget in ((GRID, side**2), *((rival, side**2 // 10) for rival in RIVALS))
    }
    gains = HeldOut(model, split(prompts, settings.held_out)[1], score, settings, drawing)
    best = gains(results[GRID].best)
    return {
        "steps": drawing.num_inference_steps,
        "images": len(prompts) - gains.images,
        "held_out": gains.images,
        GRID: _row(results[GRID], gains),
        **{
            rival: _row(results[rival], gains)
            | _matched(results[rival], gains, best, results[GRID].network_rows)
            for rival in RIVALS
        },
    }


class HeldOut:
    """What candidates gain over the schedule as it is on images that no search has seen."""

    def __init__(
        self,
        model: TextToImageModel,
        prompts: Sequence[Prompt],
        score: Score,
        settings: Settings,
        drawing: Drawing,
    ) -> None:
        model.pipeline.scheduler = QSched.wrap(model.pipeline.scheduler)
        self.weights = settings.objective
        self.drawn = Evaluator(
            model, prompts, score, list(self.weights), replace(drawing, seed=drawing.seed + 1)
        )
        self.images = len(self.drawn.prompts)

    def scores(self, candidate: Coefficients) -> Scores:
        """Of its images."""
        return self.drawn([candidate])[0]

    def interval(self, candidate: Coefficients) -> tuple[float, tuple[float, float]]:
        """Mean gain, and its bootstrap interval over prompts."""
        base = self.scores(Coefficients.ones(len(candidate)))
        return accept(
            self.weights, base, self.scores(candidate), [p.text for p in self.drawn.prompts]
        )

    def __call__(self, candidate: Coefficients) -> float:
        """Mean gain."""
        base = self.scores(Coefficients.ones(len(candidate)))
        return Objective(self.weights, base)(candidate, self.scores(candidate))


def _row(result: TuneResult, gains: HeldOut) -> dict[str, Any]:
    gain, interval = gains.interval(result.best)
    return {
        "rows": result.network_rows,
        "value": round(result.calibration_value, 4),
        "held_out_value": round(gain, 4),
        "interval": [round(v, 4) for v in interval],
    }


def _matched(result: TuneResult, gains: HeldOut, wanted: float, rows: int) -> dict[str, Any]:
    """After how many rows of the network the best so far is as good as `wanted`, and stays so."""
    found = None
    for row in reversed(leaders(result.history)):
        if gains(Coefficients.from_vector(row["coefficients"])) < wanted:
            break
        found = row["rows"]
    return {"rows_to_match": found, "ratio": round(rows / found, 2) if found else None}


def leaders(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidates that were better than all before them."""
    found = list(history[:1])
    for row in history[1:]:
        if row["value"] > found[-1]["value"]:
            found.append(row)
    return found


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each rival over students and seeds: how many matched the grid, and the median ratio of those."""
    table: dict[str, Any] = {}
    for rival in RIVALS:
        ratios = [f[rival]["ratio"] for f in found if f[rival]["ratio"] is not None]
        table[rival] = {
            "ratio": median(ratios) if ratios else None,
            "matched": f"{len(ratios)} of {len(found)}",
        }
    return table
