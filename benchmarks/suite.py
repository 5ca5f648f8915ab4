"""Measure the suite on Shapes: time of drawing and judging, calls, and what fewer prompts cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import BenchOptions
from diffalign.data.prompts import Prompt
from diffalign.evaluation.fill import fill_folder
from diffalign.evaluation.suite.registry import benchmark
from diffalign.evaluation.suite.run import Plan, evaluate
from diffalign.judges.base import Judge
from diffalign.judges.exact import ExactJudge
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model

MODEL = "shapes-sd3"
NAMES = ("shapes:checklist", "shapes:rubric")
PROMPTS = (12, 24, 48, 98)
"""Numbers of prompts; the last one is all held-out prompts."""


def run(options: BenchOptions) -> dict[str, Any]:
    """Run the checklist and the rubric at several numbers of prompts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(MODEL, device=device)
    arms: dict[str, Any] = {}
    for name in options.select(NAMES):
        numbers = PROMPTS[:2] if options.quick else PROMPTS
        arms[name] = {str(n): _measure(name, n, model, options.work) for n in numbers}
    largest = {name: list(cells.values())[-1] for name, cells in arms.items()}
    headline = {f"{name} {key}": cell[key] for name, cell in largest.items() for key in HEADLINE}
    return {"headline": headline, "arms": arms, "model": MODEL, "threads": torch.get_num_threads()}


HEADLINE = ("score", "low", "high", "calls", "drawing_share")


def _measure(name: str, number: int, model: TextToImageModel, work: Path) -> dict[str, Any]:
    """Return the score of a benchmark on some prompts, and what it took."""
    folder = work / f"{name.replace(':', '-')}-{number}"
    spent = {"drawing": 0.0}

    def draw(place: Path, prompts: list[Prompt], count: int) -> None:
        start = time.perf_counter()
        drawing = Drawing(num_inference_steps=10, images_per_prompt=count, seed=1000)
        fill_folder(place, prompts, lambda: model, drawing, made={"model": MODEL})
        spent["drawing"] += time.perf_counter() - start

    def judges(*_: Any) -> dict[str, Judge]:
        judge = ExactJudge()
        return {"words": judge, "text": judge}

    start = time.perf_counter()
    result = evaluate(benchmark(name), Plan(quick=number), folder, open_judges=judges, draw=draw)
    seconds = time.perf_counter() - start
    figure = result["figures"][result["headline"]]
    return {
        "score": result["score"],
        "low": figure["low"],
        "high": figure["high"],
        "chance": result["chance"]["value"],
        "prompts": result["prompts"],
        "images": result["images"]["found"],
        "questions": result["questions"],
        "calls": result["asked"],
        "seconds": round(seconds, 2),
        "drawing_share": round(spent["drawing"] / seconds, 3),
        "known_answers": f"{result['judge_check']['right']} of {result['judge_check']['asked']}",
    }
