"""AWM against Flow-GRPO and DiffusionNFT on the same loop, model, prompts and machine; and AWM's levers.

Every arm is a recipe with overrides, and all train for the same time. The first comparison gives all three the same
adapter, the guided reference, fewer timesteps and distances; the second is with the hyper-parameters of the releases,
but for the rate, which is ours: without guidance, rewards alone move the policy. A lever's arm changes one thing in
AWM's recipe. Causes are what an update costs, how much of its gradient is signal, and what the policies know of
relations. Phases are where its time and memory go at published sizes, on CUDA alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.awm import causes as awm_causes
from benchmarks.awm import phases as awm_phases
from benchmarks.awm.arms import AWM, EARLY, HOUR, LEVERS, LONG, RELEASED, RIVALS, Arm, configuration
from benchmarks.common.curves import Curve, finite, read_curve, speedup
from benchmarks.common.record import BenchOptions, run_once, spread
from benchmarks.common.second_opinion import REWARD, SecondOpinion
from diffalign.config import RunConfig
from diffalign.training.run_folder import RunFolder

RELEASED_AWM = "released awm"
HEADLINES = {"flow_grpo": "speedup_vs_flow_grpo", "diffusion_nft": "speedup_vs_nft"}
TARGETS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)
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
    """All seeds of an arm: curves, and the figures that make a table. `early` is its beginning, scored more often; with
    it `alike` are the curves without, scored as the other arms are."""
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
        told = partial(opinion, config)
        opinions.append(options.kept(f"second opinion {name}", seed, told, key=opinion.key(config)))
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
    """Summary and log of a run."""
    return run_once(config), RunFolder(config.output_dir).read_log()


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
    """AWM over all seeds and its rivals, each lever with one, AWM's hour, the causes and the phases; `options.arms`
    chooses among them, AWM always runs but for the phases alone. A quick bench leaves all but the rivals and the causes
    out."""
    known = {**RIVALS, **RELEASED, **LEVERS, **LONG}
    chosen = options.chosen(("awm", *known, *awm_causes.CAUSES, awm_phases.NAME))
    if chosen == [awm_phases.NAME]:
        return {"headline": {}, **awm_phases.measure(options)}
    if options.quick and options.arms is None:
        chosen = ["awm", *RIVALS, *awm_causes.CAUSES]
    opinion = SecondOpinion()
    early = None if options.quick else EARLY
    arms = {"awm": measure("awm", Arm(AWM), options, options.seeds, opinion, early=early)}
    for name in (n for n in chosen if n in known):
        seeds = 1 if name in LEVERS or name in LONG else options.seeds
        arms[name] = measure(name, known[name], options, seeds, opinion)
    headline = {
        "geneval_final": arms["awm"]["geneval_final"]["median"],
        "forwards_per_image": arms["awm"]["forwards_per_image"],
    }
    if HOUR in arms:
        headline["geneval_after_an_hour"] = arms[HOUR]["geneval_final"]["median"]
    speedups = compare({name: found for name, found in arms.items() if name not in LONG})
    for name, title in HEADLINES.items():
        if name in arms:
            decided = [v for v in speedups[f"awm over {name}"]["seconds"] if not math.isnan(v)]
            headline[title] = finite(median(decided)) if decided else None
    ratios = {
        pair: {unit: [finite(v) for v in values] for unit, values in found.items()}
        for pair, found in speedups.items()
    }
    for found in arms.values():
        found.pop("alike", None)
        found["curves"] = [vars(c) for c in found["curves"]]
    causes = {
        name: options.kept(name, 0, partial(cause, options), key=awm_causes.key(name, options))
        for name, cause in awm_causes.CAUSES.items()
        if name in chosen
    }
    phases = awm_phases.measure(options) if awm_phases.NAME in chosen else {}
    return {"headline": headline, "speedups": ratios, "arms": arms, **causes, **phases}


def compare(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Speedups of AWM over every other arm, with all of its scores and with as few as the others have; of the released
    AWM over the other released ones. Seed by seed, as many as both have."""
    pairs = {f"awm over {n}": (arms["awm"]["curves"], n) for n in arms if n != "awm"}
    if "alike" in arms["awm"]:
        pairs |= {
            f"awm over {n}, scored alike": (arms["awm"]["alike"], n) for n in arms if n != "awm"
        }
    if RELEASED_AWM in arms:
        others = [n for n in RELEASED if n in arms and n != RELEASED_AWM]
        ours = arms[RELEASED_AWM]["curves"]
        pairs |= {f"{RELEASED_AWM} over {n}": (ours, n) for n in others}
    return {
        pair: {
            unit: [speedup(f, s, unit) for f, s in zip(fast, arms[n]["curves"], strict=False)]
            for unit in UNITS
        }
        for pair, (fast, n) in pairs.items()
    }
