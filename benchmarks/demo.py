"""Run the demo over seeds, with and without its guided reference and its reward.

A seed sets the evaluation images and all randomness of training; every arm uses the same seeds. An arm stops like the
demo: after its number of updates or after its minutes, whichever comes first.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common.record import BenchOptions, run_once, spread
from diffalign.config import RunConfig, load

ARMS = {
    "demo": [],
    "plain reference": ["--algorithm.reference_guidance_scale=null"],
    # The advantages are so small that only the distance to the guided reference remains, on all images:
    # distillation.
    "no reward": [
        "--algorithm.advantage_max=1e-9",
        "--training.drop_uninformative=false",
    ],
}
HEADLINES = {
    "demo": "geneval_gain",
    "plain reference": "gain_without_guided_reference",
    "no reward": "gain_without_reward",
}
QUICK = [
    "--training.num_updates=3",
    "--evaluation.images_per_task=8",
    "--rollout.prompts_per_update=4",
]


def configuration(arm: str, seed: int, options: BenchOptions) -> RunConfig:
    """Return the configuration of one arm and seed. A run folder that exists is resumed."""
    overrides = [
        f"--output_dir={options.folder(arm, seed)}",
        f"--training.seed={seed}",
        f"--evaluation.seed={1000 + seed}",
        *ARMS[arm],
        *(QUICK if options.quick else []),
    ]
    return load("demo", overrides)


def run(options: BenchOptions) -> dict[str, Any]:
    """Run the selected arms with all seeds."""
    arms: dict[str, dict[str, Any]] = {}
    for arm in options.select(ARMS):
        summaries = [run_once(configuration(arm, seed, options)) for seed in range(options.seeds)]
        tasks = [s["after"]["tasks"] for s in summaries]
        arms[arm] = {
            "gain": spread(s["geneval_after"] - s["geneval_before"] for s in summaries),
            "geneval_before": spread(s["geneval_before"] for s in summaries),
            "geneval_after": spread(s["geneval_after"] for s in summaries),
            "training_seconds": spread(s["training_seconds"] for s in summaries),
            "seconds": spread(s["seconds"] for s in summaries),
            "updates": spread(s["updates"] for s in summaries),
            "images": summaries[0]["after"]["images"],
            "versions": [s["versions"] for s in summaries],
            "tasks_after": {k: spread(t[k] for t in tasks) for k in tasks[0]},
        }
    gains = {HEADLINES[arm]: figures["gain"]["median"] for arm, figures in arms.items()}
    return {"headline": {**gains, "seeds": options.seeds}, "arms": arms}
