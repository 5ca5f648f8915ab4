"""Benchmark DC-Gen on Shapes: quality, closed-form alignment and latency of a moved model.

The moved model has a quarter of the base model's tokens. One seed is one run of the recipe, resumed from its work
folder; all seeds share a cache of latents.
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
from diffalign.evaluation.score import Evaluation, drawing_of, evaluate_model
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
"""Images per task: twice the run's own number, so that seeds differ by their models."""
FEWER = (6, 4)
"""Numbers of steps at which base and moved model are also sampled."""
RATES = (1e-4, 1e-3, 1e-2)
"""Learning rates of the gradient form: the released one, and two that are tuned for it."""
BATCH = 64
MOST_STEPS, CHECK = 20_000, 50
NEAR = 1.01
"""Ratio to the optimal loss at which gradient steps stop."""


def configuration(seed: int, options: BenchOptions) -> LatentRunConfig:
    """Return the configuration of one seed."""
    overrides = [
        f"--output_dir={options.folder('dcgen', seed)}",
        f"--training.seed={seed}",
        f"--evaluation.seed={1000 + seed}",
        f"--latents.cache={options.work / 'cache'}",
        *(QUICK if options.quick else []),
    ]
    return load(RECIPE, overrides)


def run(options: BenchOptions) -> dict[str, Any]:
    """Run the selected parts."""
    selected = options.select(ARMS)
    result: dict[str, Any] = {}
    headline: dict[str, Any] = {}
    if "quality" in selected:
        eyes = Eyes()
        seeds = [quality(seed, options, eyes) for seed in range(options.seeds)]
        result["quality"] = {
            variant: {name: spread(s[variant][name] for s in seeds) for name in seeds[0][variant]}
            for variant in ("base", "aligned", "moved")
        }
        result["fewer_steps"] = {
            steps: {variant: spread(s["fewer"][steps][variant] for s in seeds) for variant in rows}
            for steps, rows in seeds[0]["fewer"].items()
        }
        result["runs"] = [s["run"] for s in seeds]
        headline["token_ratio"] = seeds[0]["run"]["token_ratio"]
        headline["geneval_base"] = result["quality"]["base"]["geneval"]["median"]
        headline["geneval_dc"] = result["quality"]["moved"]["geneval"]["median"]
    if "alignment" in selected:
        result["alignment"] = alignment(options)
        headline["alignment_speedup"] = result["alignment"]["speedup"]["median"]
    if "latency" in selected:
        config = configuration(0, options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base, moved = load_model(config.model.name, device=device), start(config).to(device)
        result["latency"] = parts_of({"base": base, "moved": moved}, quick=options.quick)
        result["latency"]["flops"] = flops({"base": base, "moved": moved})
        headline["latency_ratio"] = result["latency"]["ratio"]["all"]["median"]
    if "sizes" in selected:
        result["sizes"] = real_sizes(quick=options.quick)
    return {"headline": headline, **result}


def start(config: LatentRunConfig, *, ends: Path | None = None) -> TextToImageModel:
    """Move a run's base model, with zero ends or the ends of a file."""
    assert config.latents.autoencoder is not None
    base = load_model(config.model.name)
    vae = load_autoencoder(config.latents.autoencoder)
    model = move_model(base, vae, size=base.default_size)
    if ends is not None:
        assert model.ends is not None
        load_ends(model.denoiser, model.ends, ends)
    return model


def quality(seed: int, options: BenchOptions, eyes: Eyes) -> dict[str, Any]:
    """Score the base model, the moved model after alignment, and the moved model after training."""
    config = configuration(seed, options)
    summary = run_once(config)
    folder = Path(config.output_dir)
    reward = CompositeReward.from_config(config.rewards)
    models: dict[str, Callable[[], TextToImageModel]] = {
        "base": lambda: load_model(config.model.name),
        "aligned": lambda: start(config, ends=folder / ALIGNED),
        "moved": lambda: load_model(str(folder / "pipeline")),
    }
    images_per_task = config.evaluation.images_per_task if options.quick else IMAGES_PER_TASK
    setting = replace(config.evaluation, images_per_task=images_per_task)
    evaluations = {name: evaluate(make(), setting, reward) for name, make in models.items()}
    base = evaluations["base"]
    result: dict[str, Any] = {}
    for name, evaluation in evaluations.items():
        scores = {"geneval": evaluation.tasks["overall"], "fid": eyes.fid(evaluation.images)}
        scores |= {f"task/{k}": v for k, v in evaluation.tasks.items() if k != "overall"}
        wins = win_rate(evaluation.rewards, base.rewards, [p.text for p in base.prompts])
        scores["win_rate"] = 0.5 if wins is None else wins.rate
        result[name] = scores
    result["fewer"] = {}
    for steps in FEWER:
        fewer = replace(setting, num_inference_steps=steps)
        result["fewer"][str(steps)] = {
            name: evaluate(models[name](), fewer, reward).tasks["overall"]
            for name in ("base", "moved")
        }
    tokens = summary["tokens"]
    log = RunFolder(folder).read_log()
    curve = read_curve(log, summary, config.training.images_per_update)
    result["run"] = {
        "curve": {"score": curve.score[1:], "seconds": curve.cost["seconds"][1:]},
        "token_ratio": tokens["base"] / tokens["moved"],
        "updates": summary["updates"],
        "training_seconds": summary["training_seconds"],
        "precompute_seconds": summary["precompute_seconds"],
        "alignment": summary["alignment"],
        "validation": {k: v for k, v in summary["after"].items() if k.startswith("validation")},
        "images": summary["images"],
    }
    return result


def evaluate(
    model: TextToImageModel, config: EvaluationConfig, reward: CompositeReward
) -> Evaluation:
    """Evaluate a model on the held-out prompts, as the run does."""
    prompts = load_prompts("shapes:held_out")
    return evaluate_model(model, prompts, reward.score, drawing_of(config))


def alignment(options: BenchOptions) -> dict[str, Any]:
    """Time the closed form and gradient steps on the same rows.

    Gradient steps stop when their loss is at most `NEAR` times the optimum.
    """
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
    """Take gradient steps until the loss over all rows is at most `goal`.

    A step uses one batch of images. The time of checking the loss is not counted.
    """
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
