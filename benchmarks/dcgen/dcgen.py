"""DC-Gen on Shapes: a model before and after it moved to a quarter of its tokens, what closed-form alignment saves, and
where the time of an image goes.

A seed is one run of the recipe; its folder is kept in the work folder, and all seeds share a cache of latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.curves import read_curve
from benchmarks.common.eyes import Eyes
from benchmarks.common.record import BenchOptions, run_once, spread
from benchmarks.dcgen.latency import flops, parts_of, real_sizes
from diffalign.config import EvaluationConfig, LatentRunConfig, load
from diffalign.core import processes
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.preference import win_rate
from diffalign.evaluation.score import Evaluation, evaluate_model
from diffalign.latents.alignment import GradientAlignment, Statistics
from diffalign.latents.move import load_ends
from diffalign.methods.dcgen.alignment import Alignment
from diffalign.methods.dcgen.maker import precompute_latents
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.moving import load_autoencoder, move_model
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward
from diffalign.training.run_folder import ALIGNED, RunFolder

ARMS = ("quality", "alignment", "latency", "sizes")
RECIPE = "dcgen-shapes-flux"
QUICK = [
    *("--training.num_updates=3", "--latents.limit=512", "--latents.alignment_images=256"),
    *("--evaluation.images_per_task=4", "--training.images_per_update=32"),
    *("--training.micro_batch_size=32", "--training.eval_every=0", "--training.sample_every=0"),
]
IMAGES_PER_TASK = 128
"""Twice those of the run's own evaluations, so that seeds differ by their models."""
FEWER = (6, 4)
"""Steps at which base and moved model are drawn as well."""
RATES = (1e-4, 1e-3, 1e-2)
"""Of the gradient form: the released one, and two that are tuned for it."""
BATCH = 64
MOST_STEPS, CHECK = 20_000, 50
NEAR = 1.01
"""The gradient form has arrived at a loss so near to the optimum."""


def configuration(seed: int, options: BenchOptions) -> LatentRunConfig:
    """The run of a seed."""
    overrides = [
        f"--output_dir={options.folder('dcgen', seed)}",
        f"--training.seed={seed}",
        f"--evaluation.seed={1000 + seed}",
        f"--latents.cache={options.work / 'cache'}",
        *(QUICK if options.quick else []),
    ]
    return load(RECIPE, overrides)


def run(options: BenchOptions) -> dict[str, Any]:
    """The chosen parts."""
    chosen = options.chosen(ARMS)
    found: dict[str, Any] = {}
    headline: dict[str, Any] = {}
    if "quality" in chosen:
        eyes = Eyes()
        seeds = [quality(seed, options, eyes) for seed in range(options.seeds)]
        found["quality"] = {
            how: {name: spread(s[how][name] for s in seeds) for name in seeds[0][how]}
            for how in ("base", "aligned", "moved")
        }
        found["fewer_steps"] = {
            steps: {how: spread(s["fewer"][steps][how] for s in seeds) for how in rows}
            for steps, rows in seeds[0]["fewer"].items()
        }
        found["runs"] = [s["run"] for s in seeds]
        headline["token_ratio"] = seeds[0]["run"]["token_ratio"]
        headline["geneval_base"] = found["quality"]["base"]["geneval"]["median"]
        headline["geneval_dc"] = found["quality"]["moved"]["geneval"]["median"]
    if "alignment" in chosen:
        found["alignment"] = alignment(options)
        headline["alignment_speedup"] = found["alignment"]["speedup"]["median"]
    if "latency" in chosen:
        config = configuration(0, options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base, moved = load_model(config.model.name, device=device), start(config).to(device)
        found["latency"] = parts_of({"base": base, "moved": moved}, quick=options.quick)
        found["latency"]["flops"] = flops({"base": base, "moved": moved})
        headline["latency_ratio"] = found["latency"]["ratio"]["all"]["median"]
    if "sizes" in chosen:
        found["sizes"] = real_sizes(quick=options.quick)
    return {"headline": headline, **found}


def start(config: LatentRunConfig, *, ends: Path | None = None) -> TextToImageModel:
    """The base of a run moved, with zeros for ends or those of a file."""
    assert config.latents.autoencoder is not None
    base = load_model(config.model.name)
    vae = load_autoencoder(config.latents.autoencoder)
    model = move_model(base, vae, size=base.default_size)
    if ends is not None:
        assert model.ends is not None
        load_ends(model.denoiser, model.ends, ends)
    return model


def quality(seed: int, options: BenchOptions, eyes: Eyes) -> dict[str, Any]:
    """Scores of the base, of the moved model when its ends had been aligned, and of it at the end."""
    config = configuration(seed, options)
    summary = run_once(config)
    folder = Path(config.output_dir)
    reward = CompositeReward.from_config(config.rewards)
    models: dict[str, Callable[[], TextToImageModel]] = {
        "base": lambda: load_model(config.model.name),
        "aligned": lambda: start(config, ends=folder / ALIGNED),
        "moved": lambda: load_model(str(folder / "pipeline")),
    }
    each = config.evaluation.images_per_task if options.quick else IMAGES_PER_TASK
    scored = replace(config.evaluation, images_per_task=each)
    drawn = {how: draw(make(), scored, reward) for how, make in models.items()}
    found: dict[str, Any] = {}
    for how, images in drawn.items():
        scores = {"geneval": images.tasks["overall"], "fid": eyes.fid(images.images)}
        scores |= {f"task/{k}": v for k, v in images.tasks.items() if k != "overall"}
        wins = win_rate(
            images.rewards, drawn["base"].rewards, [p.text for p in drawn["base"].prompts]
        )
        scores["win_rate"] = 0.5 if wins is None else wins.rate
        found[how] = scores
    found["fewer"] = {
        str(steps): {
            how: draw(models[how](), replace(scored, num_inference_steps=steps), reward).tasks[
                "overall"
            ]
            for how in ("base", "moved")
        }
        for steps in FEWER
    }
    tokens = summary["tokens"]
    log = RunFolder(folder).read_log()
    curve = read_curve(log, summary, config.training.images_per_update)
    found["run"] = {
        "curve": {"score": curve.score[1:], "seconds": curve.cost["seconds"][1:]},
        "token_ratio": tokens["base"] / tokens["moved"],
        "updates": summary["updates"],
        "training_seconds": summary["training_seconds"],
        "precompute_seconds": summary["precompute_seconds"],
        "alignment": summary["alignment"],
        "validation": {k: v for k, v in summary["after"].items() if k.startswith("validation")},
        "images": summary["images"],
    }
    return found


def draw(model: TextToImageModel, config: EvaluationConfig, reward: CompositeReward) -> Evaluation:
    """Held-out prompts as the run's evaluations draw them."""
    return evaluate_model(model, load_prompts("shapes:held_out"), reward.score, config)


def alignment(options: BenchOptions) -> dict[str, Any]:
    """Seconds of the closed form, and of gradient steps until they are as near to it as `NEAR`, on the same rows."""
    config = configuration(0, options)
    base = load_model(config.model.name)
    assert config.latents.autoencoder is not None
    vae = load_autoencoder(config.latents.autoencoder)
    moved = move_model(base, vae, size=base.default_size)
    accelerator = processes.make_accelerator()
    cache = precompute_latents(config, base, accelerator, codec=moved.codec)
    pairs = Alignment(base, moved, cache, cache.paired, accelerator, BATCH)
    rows = [pairs.rows(batch) for _, batch in pairs.batches(paired=True)]
    closed, fits = [], []
    for _ in range(options.seeds):
        started = time.perf_counter()
        statistics = Statistics(rows[0][0].shape[1], rows[0][1].shape[1])
        for x, y in rows:
            statistics.add(x, y)
        fits.append(statistics.solve())
        closed.append(time.perf_counter() - started)
    optimum = fits[-1].error
    most = 50 if options.quick else MOST_STEPS
    forms = {
        f"{rate:g}": [
            descend(rows, rate=rate, seed=seed, goal=NEAR * optimum, most=most)
            for seed in range(options.seeds)
        ]
        for rate in RATES
    }
    best = min(
        forms, key=lambda rate: max(f["seconds"] + 1e6 * (not f["arrived"]) for f in forms[rate])
    )
    return {
        "rows": sum(len(x) for x, _ in rows),
        "r2": fits[-1].r2,
        "error": optimum,
        "closed_form_seconds": spread(closed),
        "gradient": forms,
        "best_rate": best,
        "all_arrived": all(f["arrived"] for f in forms[best]),
        "speedup": spread(f["seconds"] / c for f, c in zip(forms[best], closed, strict=True)),
        "speedup_over_released_rate": spread(
            f["seconds"] / c for f, c in zip(forms[f"{RATES[0]:g}"], closed, strict=True)
        ),
    }


def descend(
    rows: Sequence[tuple[Tensor, Tensor]], *, rate: float, seed: int, goal: float, most: int
) -> dict[str, Any]:
    """Gradient steps, a batch of images each, until the loss over all rows is below `goal`; looking at it costs no
    time."""
    generator = torch.Generator().manual_seed(seed)
    x_all, y_all = (torch.cat([r[i] for r in rows]) for i in (0, 1))
    layer = GradientAlignment(x_all.shape[1], y_all.shape[1], learning_rate=rate, seed=seed)
    seconds, steps, error = 0.0, 0, float("inf")
    while steps < most and error > goal:
        order = torch.randint(len(rows), (min(CHECK, most - steps),), generator=generator).tolist()
        started = time.perf_counter()
        for i in order:
            layer.step(*rows[i])
        seconds += time.perf_counter() - started
        steps += len(order)
        error = layer.error(x_all, y_all)
    return {
        "steps": steps,
        "seconds": round(seconds, 3),
        "error": error,
        "arrived": error <= goal,
    }
