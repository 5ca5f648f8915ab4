"""Measure `diffalign optimise` on the shipped models: the plan that it finds in ten minutes, and what the plan costs.

Seconds are those of the processor, on one core, so that other programs do not count. The loss of GenEval is that of
held-out prompts, with the interval by which the plan was accepted.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.common.record import BenchOptions, spread
from diffalign.data.prompts import load_prompts
from diffalign.optimisation import saving
from diffalign.optimisation.limits import GENEVAL, Limits
from diffalign.optimisation.run import Optimised, Settings, optimise
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward

MODELS = ("shapes-sd3", "shapes-flux")
STEPS = 28
MINUTES = 10.0
LOSS = 0.01
"""Loss of GenEval that is allowed."""
PER_TASK = 120
"""Number of held-out images of each task.

Fewer could hardly show a loss below `LOSS`.
"""


def run(options: BenchOptions) -> dict[str, Any]:
    """Search a plan for every model with every seed.

    Measurements are kept in the work folder.
    """
    torch.set_num_threads(1)
    arms: dict[str, Any] = {}
    for name in options.select(MODELS):
        rows = [_searched(name, seed, options) for seed in range(options.seeds)]
        figures = {
            key: spread(row[key] for row in rows) for key in ("ratio", "minutes", "low", "loss")
        }
        arms[name] = {**figures, "accepted": all(r["accepted"] for r in rows), "runs": rows}
    headline = {
        "optimise_ratio": min(arm["ratio"]["median"] for arm in arms.values()),
        "optimise_minutes": max(arm["minutes"]["median"] for arm in arms.values()),
        "geneval_drop": max(arm["loss"]["median"] for arm in arms.values()),
        "accepted": all(arm["accepted"] for arm in arms.values()),
    }
    return {"headline": headline, "arms": arms, "steps": STEPS, "allowed": LOSS}


def _searched(name: str, seed: int, options: BenchOptions) -> dict[str, Any]:
    """Return the figures of one model and seed."""
    limit = 10 * LOSS if options.quick else LOSS
    settings = Settings(Limits(differences={GENEVAL: -limit}), minutes=MINUTES)
    model = load_model(name, dtype=torch.float32)
    model.pipeline.set_progress_bar_config(disable=True)
    drawing = Drawing(
        STEPS,
        images_per_task=8 if options.quick else PER_TASK,
        seed=seed,
        micro_batch_size=32,
        mixed_precision="no",
    )
    result = optimise(
        model,
        load_prompts("shapes:train"),
        CompositeReward.from_config({"verifier": 1.0}).score,
        settings,
        drawing,
        options.folder(name, seed),
        clock=time.process_time,
        say=lambda text: print(f"{name}, seed {seed}: {text}", flush=True),
    )
    return _figures(result, name)


def _figures(result: Optimised, name: str) -> dict[str, Any]:
    """Return the figures of a search; without an accepted plan the ratio is 1."""
    record = saving.to_dict(result, model=name)
    tested = result.choice.held_out[GENEVAL].estimate if result.choice is not None else None
    return {
        "accepted": result.choice is not None,
        "ratio": 1.0 if result.choice is None else result.choice.ratio,
        "loss": 0.0 if tested is None else -tested.value,
        "low": 0.0 if tested is None or tested.low is None else tested.low,
        "minutes": result.seconds / 60,
        "plan": None if result.choice is None else result.name(result.choice),
        **{k: record[k] for k in ("points", "front", "tested", "images", "machine")},
    }
