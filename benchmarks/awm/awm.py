"""Compare AWM with other methods of online RL on one training loop.

Model, prompts, machine and training time are the same for all arms; an arm is a recipe with overrides. The first
comparison gives all three methods the same adapter, the guided reference, few timesteps and few distances. The second
comparison uses the hyper-parameters of the releases except for the learning rate, which is this suite's. It has no
guidance, so that rewards alone move the policy. The arm of a lever changes one setting of AWM's recipe.

The causes measure the cost of an update, the share of its gradient that is signal, and whether policies render spatial
relations. The phases measure time and memory at published sizes, on CUDA only.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.awm import causes as awm_causes
from benchmarks.awm import phases as awm_phases
from benchmarks.awm.arms import (
    AWM,
    EARLY,
    HOUR,
    LEVERS,
    LONG,
    NEWER,
    RELEASED,
    RIVALS,
    Arm,
    configuration,
)
from benchmarks.common.curves import Curve, finite, read_curve, speedup
from benchmarks.common.record import BenchOptions, run_once, spread
from benchmarks.common.second_opinion import REWARD, SecondOpinion
from diffalign.config import RunConfig
from diffalign.training.run_folder import RunFolder

RELEASED_AWM = "released awm"
HEADLINES = {"flow_grpo": "speedup_vs_flow_grpo", "diffusion_nft": "speedup_vs_nft"}
TARGETS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.85, 0.9)
UNITS = ("seconds", "images", "forwards")


def measure(
    name: str,
    arm: Arm,
    options: BenchOptions,
    seeds: int,
    opinion: SecondOpinion,
    *,
    early: Arm | None = None,
) -> dict[str, Any]:
    """Train every seed of an arm and return its learning curves and table figures.

    If `early` is given, its run repeats the first updates and is scored more often; its scores are added to `curves`.
    In that case `alike` holds the curves without these scores, comparable with the other arms.
    """
    curves, summaries, logs, opinions = [], [], [], []
    alike: dict[str, list[Curve]] = {} if early is None else {"alike": []}
    if not options.quick:
        warm_up(configuration(name, arm, 0, options))
    for seed in range(seeds):
        config = configuration(name, arm, seed, options)
        summary, log = train(config)
        summaries.append(summary)
        logs.append(log)
        group = config.rollout.images_per_update
        curves.append(read_curve(log, summary, group))
        if early is not None:
            alike["alike"].append(curves[-1])
            more = train(configuration(f"{name} early", early, seed, options))[1]
            curves[-1] = read_curve(log, summary, group, early=more)
        evaluate = partial(opinion, config)
        key = opinion.key(config)
        opinions.append(options.cached(f"second opinion {name}", seed, evaluate, key=key))
    rows = [row for log in logs for row in log]
    return {
        "curves": curves,
        **alike,
        "geneval_before": spread(s["geneval_before"] for s in summaries),
        "geneval_final": spread(s["geneval_after"] for s in summaries),
        REWARD: {
            **{key: spread(s[key] for s in opinions) for key in ("before", "after", "win_rate")},
            "intervals": [s["interval"] for s in opinions],
        },
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


def train(config: RunConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a configuration once and return its summary and its log."""
    return run_once(config), RunFolder(config.output_dir).read_log()


def warm_up(config: RunConfig) -> None:
    """Train one update in a separate folder, which fills the cache of compiled kernels.

    Without it the first arm would pay the compilation of the arms after it.
    """
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
    """Run AWM, its rivals, newer methods, its levers, the causes and the phases.

    AWM, its rivals and the newer methods use all seeds; a lever and the hour-long run use one. `options.arms` selects
    among them, and AWM always runs unless only the phases are selected. A quick bench runs AWM, the rivals and the
    causes.
    """
    available = {**RIVALS, **NEWER, **RELEASED, **LEVERS, **LONG}
    selected = options.select(("awm", *available, *awm_causes.CAUSES, awm_phases.NAME))
    if selected == [awm_phases.NAME]:
        return {"headline": {}, **awm_phases.measure(options)}
    if options.quick and options.arms is None:
        selected = ["awm", *RIVALS, *awm_causes.CAUSES]
    opinion = SecondOpinion()
    early = None if options.quick else EARLY
    arms = {"awm": measure("awm", Arm(AWM), options, options.seeds, opinion, early=early)}
    for name in (n for n in selected if n in available):
        seeds = 1 if name in LEVERS or name in LONG else options.seeds
        arms[name] = measure(name, available[name], options, seeds, opinion)
    headline = {
        "geneval_final": arms["awm"]["geneval_final"]["median"],
        "forwards_per_image": arms["awm"]["forwards_per_image"],
    }
    if HOUR in arms:
        headline["geneval_after_an_hour"] = arms[HOUR]["geneval_final"]["median"]
    speedups = compare({name: arm for name, arm in arms.items() if name not in LONG})
    for name, title in HEADLINES.items():
        if name in arms:
            ratios = [v for v in speedups[f"awm over {name}"]["seconds"] if not math.isnan(v)]
            headline[title] = finite(median(ratios)) if ratios else None
    json_speedups = {
        pair: {unit: [finite(v) for v in values] for unit, values in by_unit.items()}
        for pair, by_unit in speedups.items()
    }
    for arm in arms.values():
        arm.pop("alike", None)
        arm["curves"] = [vars(c) for c in arm["curves"]]
    causes = {
        name: options.cached(name, 0, partial(cause, options), key=awm_causes.key(name, options))
        for name, cause in awm_causes.CAUSES.items()
        if name in selected
    }
    phases = awm_phases.measure(options) if awm_phases.NAME in selected else {}
    return {"headline": headline, "speedups": json_speedups, "arms": arms, **causes, **phases}


def compare(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the speedups of AWM over every other arm, by pair, unit and seed.

    Each pair uses all of AWM's scores; the pairs named "scored alike" use only as many as the other arm has. The
    released AWM is compared with the other released methods. Seeds that only one arm of a pair has are left out.
    """
    pairs = {f"awm over {n}": (arms["awm"]["curves"], n) for n in arms if n != "awm"}
    if "alike" in arms["awm"]:
        pairs |= {
            f"awm over {n}, scored alike": (arms["awm"]["alike"], n) for n in arms if n != "awm"
        }
    if RELEASED_AWM in arms:
        others = [n for n in RELEASED if n in arms and n != RELEASED_AWM]
        released_curves = arms[RELEASED_AWM]["curves"]
        pairs |= {f"{RELEASED_AWM} over {n}": (released_curves, n) for n in others}
    return {
        pair: {
            unit: [speedup(f, s, unit) for f, s in zip(fast, arms[n]["curves"], strict=False)]
            for unit in UNITS
        }
        for pair, (fast, n) in pairs.items()
    }
