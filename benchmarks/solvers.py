"""What a solver's steps are worth on `shapes-sd3`: GenEval by number of steps, the base without an adapter."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common.record import BenchOptions, spread
from diffalign.config import SOLVERS, EvaluationConfig
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.score import evaluate_model
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward

MODEL = "shapes-sd3"
STEPS = (4, 5, 6, 8, 10, 20)


def run(options: BenchOptions) -> dict[str, Any]:
    """Both solvers at every number of steps; a seed draws the same noise for all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(MODEL, device=device)
    prompts = load_prompts("shapes:held_out")
    reward = CompositeReward.from_config({"verifier": 1.0})
    arms: dict[str, dict[str, Any]] = {}
    for solver in options.chosen(SOLVERS):
        arms[solver] = {}
        for steps in STEPS[:3] if options.quick else STEPS:
            configs = [
                EvaluationConfig(
                    num_inference_steps=steps,
                    solver=solver,
                    images_per_task=8 if options.quick else 64,
                    seed=seed,
                )
                for seed in range(options.seeds)
            ]
            found = [evaluate_model(model, prompts, reward.score, c) for c in configs]
            arms[solver][str(steps)] = {
                "geneval": spread(e.tasks["overall"] for e in found),
                "reward": spread(e.means["reward"] for e in found),
            }
    headline = {
        f"geneval_{solver}_{steps}": scores[str(steps)]["geneval"]["median"]
        for solver, scores in arms.items()
        for steps in STEPS[:3]
    }
    return {"headline": headline, "arms": arms, "images_per_task": configs[0].images_per_task}
