"""AWM against Flow-GRPO and DiffusionNFT on the same loop, model, adapter, prompts and machine; and AWM's levers.

Every arm is a recipe with overrides, and all train for the same time. The first comparison gives all three the guided
reference; the second takes it away: then rewards alone move the policy. The third is with each method as it was
released, but for the rate, which is ours. A lever's arm changes one thing in AWM's recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from diffalign.bench.curves import Curve, finite, read_curve, speedup
from diffalign.bench.record import BenchOptions, run_once, spread
from diffalign.config import RunConfig, load
from diffalign.training.run_folder import RunFolder


@dataclass(frozen=True)
class Arm:
    """A recipe and what is changed in it."""

    recipe: str
    overrides: tuple[str, ...] = ()


AWM = "awm-shapes-sd3"
RIVALS = {
    "flow_grpo": Arm("flow-grpo-shapes-sd3"),
    "diffusion_nft": Arm("diffusion-nft-shapes-sd3"),
}
PLAIN = {
    "plain awm": Arm(
        AWM, ("--algorithm.reference_guidance_scale=null", "--algorithm.kl_beta=0.01")
    ),
    "plain flow_grpo": Arm(
        "flow-grpo-shapes-sd3",
        ("--algorithm.reference_guidance_scale=null", "--algorithm.kl_beta=0.01"),
    ),
    "plain diffusion_nft": Arm(
        "diffusion-nft-shapes-sd3",
        ("--algorithm.reference_guidance_scale=null", "--algorithm.kl_beta=0.05"),
    ),
}
UNGUIDED = ("--algorithm.reference_guidance_scale=null", "--prompts.task_weights=null")
RELEASED = {
    "released awm": Arm(
        AWM,
        (
            *UNGUIDED,
            "--lora.targets=null",
            "--algorithm.weight=ghuber",
            "--algorithm.timesteps_per_image=6",
            "--algorithm.kl_timesteps=6",
            "--algorithm.timestep_start=0.07",
            "--algorithm.timestep_stop=0.86",
            "--algorithm.kl_beta=0.001",
            "--algorithm.ema_kl_beta=1",
            "--rollout.num_inference_steps=14",
            "--training.drop_uninformative=false",
        ),
    ),
    "released flow_grpo": Arm(
        "flow-grpo-shapes-sd3",
        (
            *UNGUIDED,
            "--lora.targets=null",
            "--algorithm.dynamics=sde",
            "--algorithm.noise_level=0.7",
            "--algorithm.window_size=null",
            "--algorithm.window_stop=1",
            "--algorithm.kl_beta=0.04",
            "--rollout.num_inference_steps=10",
            "--training.drop_uninformative=false",
        ),
    ),
    "released diffusion_nft": Arm(
        "diffusion-nft-shapes-sd3",
        (
            *UNGUIDED,
            "--lora.targets=null",
            "--algorithm.timesteps_per_image=9",
            "--algorithm.kl_timesteps=9",
            "--algorithm.timestep_stop=0.9",
            "--algorithm.kl_beta=1e-4",
            "--rollout.num_inference_steps=10",
        ),
    ),
}
"""Hyper-parameters of the releases for GenEval. What this loop does not do stays out: Flow-GRPO's guidance in training,
the noise of AWM's rollouts, DPM-Solver in DiffusionNFT's."""
HEADLINES = {"flow_grpo": "speedup_vs_flow_grpo", "diffusion_nft": "speedup_vs_nft"}
LEVERS = {
    "released timesteps and distances": Arm(
        AWM,
        (
            "--algorithm.timesteps_per_image=6",
            "--algorithm.kl_timesteps=6",
            "--rollout.num_inference_steps=14",
        ),
    ),
    "no compilation": Arm(AWM, ("--model.compile=false",)),
    "unmerged rollouts": Arm(AWM, ("--rollout.merge_lora=false",)),
    "adams_bashforth in 5 steps": Arm(
        AWM, ("--rollout.solver=adams_bashforth", "--rollout.num_inference_steps=5")
    ),
    "distances on every timestep": Arm(AWM, ("--algorithm.kl_timesteps=2",)),
    "uniform tasks": Arm(AWM, ("--prompts.task_weights=null",)),
    "noise of the rollout": Arm(AWM, ("--algorithm.noise=rollout",)),
    "two updates a rollout": Arm(AWM, ("--training.updates_per_rollout=2",)),
}
MINUTES = 6
TARGETS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)
UNITS = ("seconds", "images", "forwards")
QUICK = (
    "--model.compile=false",
    "--training.num_updates=2",
    "--training.eval_every=1",
    "--evaluation.images_per_task=4",
    "--rollout.prompts_per_update=3",
)


def configuration(name: str, arm: Arm, seed: int, options: BenchOptions) -> RunConfig:
    """The run of one arm and seed; its folder is resumed when it is there."""
    overrides = [
        f"--output_dir={options.folder(name, seed)}",
        f"--training.seed={seed}",
        f"--evaluation.seed={1000 + seed}",
        f"--training.max_minutes={MINUTES}",
        "--training.num_updates=100000",
        "--training.eval_every=20",
        "--training.sample_every=0",
        *arm.overrides,
        *(QUICK if options.quick else ()),
    ]
    return load(arm.recipe, overrides)


def measure(name: str, arm: Arm, options: BenchOptions, seeds: int) -> dict[str, Any]:
    """All seeds of an arm: curves, and the figures that make a table."""
    curves, summaries, logs = [], [], []
    if not options.quick:
        warm_up(configuration(name, arm, 0, options))
    for seed in range(seeds):
        config = configuration(name, arm, seed, options)
        summaries.append(run_once(config))
        logs.append(RunFolder(config.output_dir).read_log())
        images = config.rollout.prompts_per_update * config.rollout.group_size
        curves.append(read_curve(logs[-1], summaries[-1], images))
    rows = [row for log in logs for row in log]
    return {
        "curves": curves,
        "geneval_before": spread(s["geneval_before"] for s in summaries),
        "geneval_final": spread(s["geneval_after"] for s in summaries),
        "diversity_first": spread(log[0]["diversity"] for log in logs),
        "diversity_last": spread(log[-1]["diversity"] for log in logs),
        "forwards_per_image": round(median(r["forwards_per_image"] for r in rows), 2),
        "images_per_second": round(median(r["images_per_second"] for r in rows), 2),
        "to_reach": {
            str(target): {
                unit: [finite(c.to_reach(target, unit)) for c in curves] for unit in UNITS
            }
            for target in TARGETS
        },
        "overrides": list(arm.overrides),
        "recipe": arm.recipe,
    }


def warm_up(config: RunConfig) -> None:
    """Compile what an arm needs, where it will be: one update in a folder of its own, then cached. Otherwise the first
    arm would pay for those after it."""
    folder = f"{config.output_dir}-warm-up"
    run_once(
        replace(
            config,
            output_dir=folder,
            training=replace(config.training, num_updates=1),
            evaluation=replace(config.evaluation, images_per_task=1),
        )
    )


def run(options: BenchOptions) -> dict[str, Any]:
    """AWM and its rivals over all seeds, each lever with one; `options.arms` chooses among them, AWM always runs. A
    quick bench leaves the levers out."""
    known = {**RIVALS, **PLAIN, **RELEASED, **LEVERS}
    chosen = options.chosen(("awm", *known))
    if options.quick and options.arms is None:
        chosen = ["awm", *RIVALS]
    arms = {"awm": measure("awm", Arm(AWM), options, options.seeds)}
    for name in (n for n in chosen if n != "awm"):
        arms[name] = measure(name, known[name], options, 1 if name in LEVERS else options.seeds)
    headline = {
        "geneval_final": arms["awm"]["geneval_final"]["median"],
        "forwards_per_image": arms["awm"]["forwards_per_image"],
    }
    ratios = {}
    for name in arms:
        ours = next((next(iter(g)) for g in (PLAIN, RELEASED) if name in g), "awm")
        if name == ours or ours not in arms:
            continue
        curves = arms[ours]["curves"], arms[name]["curves"]
        times = {unit: _speedups(*curves, unit) for unit in UNITS}
        ratios[f"{ours} over {name}"] = {u: [finite(v) for v in t] for u, t in times.items()}
        decided = [v for v in times["seconds"] if not math.isnan(v)]
        if name in HEADLINES:
            headline[HEADLINES[name]] = finite(median(decided)) if decided else None
    for found in arms.values():
        found["curves"] = [vars(c) for c in found["curves"]]
    return {"headline": headline, "speedups": ratios, "arms": arms}


def _speedups(fast: list[Curve], slow: list[Curve], unit: str) -> list[float]:
    """Seed by seed, as many as both have."""
    return [speedup(f, s, unit) for f, s in zip(fast, slow, strict=False)]
