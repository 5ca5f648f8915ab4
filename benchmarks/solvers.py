"""Measure GenEval by solver and number of steps on the base model `shapes-sd3`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common.record import BenchOptions, spread
from diffalign.config import SOLVERS
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.score import evaluate_model
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward

MODEL = "shapes-sd3"
STEPS = (4, 5, 6, 8, 10, 20)


def run(options: BenchOptions) -> dict[str, Any]:
    """Evaluate every solver at every number of steps. A seed gives all of them one noise."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(MODEL, device=device)
    prompts = load_prompts("shapes:held_out")
    reward = CompositeReward.from_config({"verifier": 1.0})
    arms: dict[str, dict[str, Any]] = {}
    for solver in options.select(SOLVERS):
        arms[solver] = {}
        for steps in STEPS[:3] if options.quick else STEPS:
            drawings = [
                Drawing(
                    num_inference_steps=steps,
                    solver=solver,
                    images_per_task=8 if options.quick else 64,
                    seed=seed,
                )
                for seed in range(options.seeds)
            ]
            evaluations = [evaluate_model(model, prompts, reward.score, d) for d in drawings]
            arms[solver][str(steps)] = {
                "geneval": spread(e.tasks["overall"] for e in evaluations),
                "reward": spread(e.means["reward"] for e in evaluations),
            }
    headline = {
        f"geneval_{solver}_{steps}": scores[str(steps)]["geneval"]["median"]
        for solver, scores in arms.items()
        for steps in STEPS[:3]
    }
    return {"headline": headline, "arms": arms, "images_per_task": drawings[0].images_per_task}
