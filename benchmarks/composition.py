"""Measure `diffalign compose` on shapes-flux: each stage alone, pairs of stages, and all of them together.

Every arm is the recipe `compose-shapes-flux` with some of its stages, in the folder of its seed. A stage is made once
for all arms that begin with the same stages. Seconds are those of the processor, on one core, so that other programs do
not count.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from benchmarks.common.record import BenchOptions, spread
from diffalign.composition.plan import Plan, make_plan
from diffalign.composition.recipe import Recipe, decode_group, load
from diffalign.composition.result import headline
from diffalign.composition.run import Composed, compose

RECIPE = "compose-shapes-flux"
ALL = "all"
ARMS: dict[str, tuple[str, ...]] = {
    "dcgen": ("dcgen",),
    "align": ("align",),
    "distill": ("distill",),
    "quantize": ("quantize",),
    "qsched": ("qsched",),
    "dcgen, align": ("dcgen", "align"),
    "dcgen, distill": ("dcgen", "distill"),
    "align, distill": ("align", "distill"),
    "distill, quantize": ("distill", "quantize"),
    "distill, qsched": ("distill", "qsched"),
    "align, quantize": ("align", "quantize"),
    "align, dcgen": ("align", "dcgen"),
    "distill, align": ("distill", "align"),
    "no alignment": ("dcgen", "distill", "quantize", "qsched", "accelerate"),
    ALL: ("dcgen", "align", "distill", "quantize", "qsched", "accelerate"),
}
"""Stages of each arm in their order.

The arms "align, dcgen" and "distill, align" show what the other order costs.
"""
QUICK: dict[str, Any] = {
    "dcgen": {
        "settings": {
            "training": {"num_updates": 2, "images_per_update": 8, "eval_every": 0},
            "latents": {"limit": 96, "alignment_images": 64},
        }
    },
    "align": {
        "settings": {
            "model": {"compile": False},
            "training": {"num_updates": 2, "eval_every": 0},
            "rollout": {"prompts_per_update": 2, "group_size": 4, "num_inference_steps": 4},
        }
    },
    "distill": {
        "settings": {
            "training": {"num_updates": 2},
            "teacher": {"prompts_per_update": 4, "num_inference_steps": 8},
        }
    },
    "quantize": {"max_prompts": 8},
    # after two updates no image is correct
    "qsched": {"objective": "flatness", "max_prompts": 12, "budget": 4},
}
FEW = {"images_per_task": 2}
"""Images of a quick run's evaluations."""
NAMES = ("speedup", "bytes_ratio", "geneval_base", "geneval_composed", "fid_base", "fid_composed")
"""Figures of the composed model that lead the result."""
TRAINED = ("dcgen", "align", "distill")
SAMPLING_SEED = 1000
"""Distance of the seeds of two measurements."""


def recipe_of(arm: str, seed: int, options: BenchOptions) -> Recipe:
    """Return the recipe of one arm and seed.

    Floors are left out, so that every arm is measured to its end.
    """
    raw = load(RECIPE).to_dict()
    stages = {name: copy.deepcopy(raw["stages"][name]) for name in ARMS[arm]}
    for name, stage in stages.items():
        stage.pop("floors", None)
        if options.quick:
            merge(stage, QUICK.get(name, {}))
        if name in TRAINED:
            merge(stage, {"settings": {"training": {"seed": seed}}})
            if options.quick:
                merge(stage, {"settings": {"evaluation": FEW}})
        elif name != "accelerate":
            stage["seed"] = seed
    measure = {**raw["measure"], "seed": SAMPLING_SEED * (1 + seed)}
    if options.quick:
        measure |= {"images_per_task": 2, "repeats": 1}
    raw |= {"stages": stages, "floors": {}, "measure": measure}
    raw["output_dir"] = str(options.work / f"seed-{seed}")
    recipe: Recipe = decode_group(Recipe, raw)
    return recipe


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Write nested settings over others, in place."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def run(options: BenchOptions) -> dict[str, Any]:
    """Compose every arm with every seed.

    Stages stay in the work folder, and the same command goes on.
    """
    torch.set_num_threads(1)
    arms: dict[str, Any] = {}
    for arm in options.select(ARMS):
        rows = [_composed(arm, seed, options) for seed in range(options.seeds)]
        names = [n for n, v in rows[0].items() if isinstance(v, int | float)]
        arms[arm] = {
            **{name: spread(row[name] for row in rows) for name in names},
            "stages": [row["stages"] for row in rows],
        }
    last = arms.get(ALL) or next(iter(arms.values()))
    return {
        "headline": {name: last[name]["median"] for name in NAMES},
        "arms": arms,
        "recipe": RECIPE,
        "cost_of_stages": {
            name: spread(stages[name]["stage_seconds"] for stages in last["stages"])
            for name in last["stages"][0]
        },
    }


def _composed(arm: str, seed: int, options: BenchOptions) -> dict[str, Any]:
    """Return the figures of one arm and seed."""
    plan: Plan = make_plan(recipe_of(arm, seed, options))
    result = compose(
        plan,
        clock=time.process_time,
        say=lambda text: print(f"{arm}, seed {seed}: {text}", flush=True),
    )
    figures = {n: v for n, v in headline(result).items() if n != "model"}
    return {**figures, "stages": _stages(result)}


def _stages(result: Composed) -> dict[str, Any]:
    """Return the figures of each stage: quality, time, size, cost, and its change to the one before."""
    stages = {}
    for row in result.rows[1:]:
        f = row.measured.figures
        change = row.to_before.get("geneval")
        stages[row.name] = {
            "geneval": row.measured.geneval,
            "geneval_to_before": None if change is None else change.to_dict(),
            "psnr_to_before": row.psnr,
            "means": f["means"],
            **{n: f.get(n) for n in ("fid", "cmmd", "seconds", "denoise_seconds", "speedup")},
            **{n: f[n] for n in ("bytes", "all_bytes", "tokens", "steps")},
            "stage_seconds": row.facts["stage_seconds"],
            "accepted": row.facts.get("accepted"),
        }
    return stages
