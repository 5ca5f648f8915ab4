"""Compare Inversion-DPO with Diffusion-DPO, its released form, and training on winners.

All arms have the same pairs, model, adapter, machine and seconds; the time that an arm spends on encoding and
inverting is subtracted from its training. The pairs are the model's own images, whose sampler states were recorded;
one arm inverts them nevertheless, as images of other origin require. Win rates compare images of held-out prompts with
the base model's images from the same noise.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from torch import Tensor

from benchmarks.common.curves import Curve, evaluations, finite, speedup
from benchmarks.common.peak_memory import peak_bytes
from benchmarks.common.record import BenchOptions, run_once, spread
from benchmarks.inversion_dpo.gradients import PAIRS, cosines
from diffalign import lora
from diffalign.config import PreferenceRunConfig, load
from diffalign.core.precision import attention
from diffalign.core.seeds import TIMESTEPS, VALIDATION
from diffalign.data.pairs.cache import PairCache
from diffalign.methods.preference.precompute import precompute
from diffalign.methods.preference.trainer import PreferenceTrainer
from diffalign.methods.preference.update import METRICS, PreferenceUpdate
from diffalign.quantization.latency import interleaved
from diffalign.training import trackers
from diffalign.training.denoise import prepare_model
from diffalign.training.run import Run
from diffalign.training.run_folder import RunFolder
from diffalign.training.sums import Sums
from diffalign.types import PreferenceBatch

SECONDS = 180.0
"""Seconds of precomputing and training together."""
RECIPES = {"shapes-sd3": "inversion-dpo-shapes", "shapes-sd": "inversion-dpo-shapes-sd"}
DIFFUSION_DPO = ("--algorithm.type=diffusion_dpo", "--pairs.inversion.states=0")
ARMS: dict[str, tuple[str, ...]] = {
    "inversion_dpo": (),
    "diffusion_dpo": (
        *DIFFUSION_DPO,
        "--algorithm.timesteps_per_pair=2",
        "--optimizer.learning_rate=1e-3",
    ),
    "inverted": ("--pairs.inversion.solver=euler", "--pairs.inversion.steps=8"),
    "released": (
        "--algorithm.variant=released",
        # Few updates are enough: the gradient of the released form is exactly zero.
        "--training.num_updates=20",
    ),
    "sft": (
        *DIFFUSION_DPO,
        "--algorithm.loss_type=sft",
        "--algorithm.timesteps_per_pair=2",
        "--optimizer.learning_rate=2e-5",
        # Updates of this arm are short.
        "--training.eval_every=200",
    ),
}
"""Overrides of each arm in the recipe of its model.

Learning rates and betas are the best of those tried with one seed (benchmarks/results/inversion-dpo-tuning.json), also
for Diffusion-DPO. The arm `released` uses this suite's values.
"""
NOISE_OF = {"inversion_dpo": "recorded states", "diffusion_dpo": "fresh noise"}
"""The two arms that are compared most closely, with the noise that each trains on."""
UNITS = ("seconds", "training")
"""Time with precomputation and time without it, since one cache serves many runs."""
IMAGES_PER_PROMPT, STATES = 8, 4
STEP_REPEATS = 8
QUICK = (
    "--training.num_updates=2",
    "--training.eval_every=1",
    "--training.pairs_per_update=8",
    "--evaluation.images_per_task=4",
    "--pairs.limit=24",
)


@dataclass(frozen=True)
class Subject:
    """One model of the comparison, with its pairs."""

    name: str
    options: BenchOptions

    @property
    def pairs(self) -> str:
        return str(self.options.work / f"pairs-{self.name}")

    @property
    def beta(self) -> float:
        """Return beta of the model's recipe, which another `algorithm.type` does not inherit."""
        config: PreferenceRunConfig = load(RECIPES[self.name])
        return config.algorithm.beta

    def make_pairs(self) -> list[str]:
        """Run `diffalign pairs` as a user would and return its arguments. Existing images are reused."""
        arguments = [
            "pairs",
            f"--model={self.name}",
            f"--output_dir={self.pairs}",
            "--pick=nested",
            f"--images_per_prompt={2 if self.options.quick else IMAGES_PER_PROMPT}",
            f"--record_states={STATES}",
            *(["--max_prompts=60"] if self.options.quick else []),
        ]
        command = [sys.executable, "-m", "diffalign.cli", *arguments]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return arguments

    def configuration(
        self, arm: str, seed: int, *, seconds: float = SECONDS
    ) -> PreferenceRunConfig:
        """Return the configuration of one arm and seed, which trains for `seconds`.

        A run folder that exists is resumed.
        """
        cache_name = "plain" if DIFFUSION_DPO[0] in ARMS[arm] else "recorded"
        cache_name = arm if arm == "inverted" else cache_name
        overrides = [
            f"--output_dir={self.options.folder(f'{self.name} {arm}', seed)}",
            f"--pairs.source={self.pairs}",
            f"--pairs.cache={self.options.work / f'cache-{self.name}-{cache_name}'}",
            f"--training.seed={seed}",
            f"--evaluation.seed={1000 + seed}",
            f"--training.max_minutes={round(seconds / 60, 3)}",
            "--training.num_updates=100000",
            "--training.eval_every=50",
            "--training.sample_every=0",
            "--evaluation.images_per_task=128",
            *ARMS[arm],
            *([f"--algorithm.beta={self.beta}"] if arm == "diffusion_dpo" else []),
            *(QUICK if self.options.quick else ()),
        ]
        config: PreferenceRunConfig = load(RECIPES[self.name], overrides)
        return config

    def precomputed(self, arms: list[str]) -> dict[str, float]:
        """Fill missing caches and return the seconds that each arm's cache took."""
        configs = {arm: self.configuration(arm, 0) for arm in arms}
        accelerator = trackers.make_accelerator(configs[arms[0]])
        # All arms have the same model.
        model = prepare_model(configs[arms[0]], accelerator.device)
        return {
            arm: float(precompute(config, model, accelerator).manifest["seconds"])
            for arm, config in configs.items()
        }


def preference_curve(log: list[dict[str, Any]], summary: dict[str, Any], name: str) -> Curve:
    """Return the score of one run over seconds with and without precomputing."""

    def read(evaluation: dict[str, Any]) -> float:
        if name == "win_rate":
            return evaluation["win_rate"]["rate"]
        return evaluation["tasks"]["overall"]

    spent = summary["precompute_seconds"]
    start = 0.5 if name == "win_rate" else read(summary["before"])
    rows = evaluations(log, {**summary["after"], "win_rate": summary["win_rate"]})
    trained = [0.0, *(log[i]["seconds"] for i, _ in rows)]
    return Curve(
        [start, start, *(read(evaluation) for _, evaluation in rows)],
        {"seconds": [0.0, *(spent + t for t in trained)], "training": [0.0, *trained]},
    )


def measure(subject: Subject, arms: list[str], seeds: int) -> dict[str, Any]:
    """Run all arms seed by seed and return their figures and implicit accuracies.

    The arms are interleaved, so that a machine that slows down affects all of them.
    """
    left = {arm: max(SECONDS - spent, 1.0) for arm, spent in subject.precomputed(arms).items()}
    configs = {
        arm: [subject.configuration(arm, seed, seconds=left[arm]) for seed in range(seeds)]
        for arm in arms
    }
    for seed in range(seeds):
        for arm in arms:
            run_once(configs[arm][seed])
    result: dict[str, Any] = {"arms": {arm: figures(subject, arm, configs[arm]) for arm in arms}}
    if set(NOISE_OF) <= set(arms):
        result["implicit_accuracy"] = crossed(
            [{a: configs[a][i] for a in NOISE_OF} for i in range(seeds)]
        )
    return result


def crossed(configs: list[dict[str, PreferenceRunConfig]]) -> dict[str, Any]:
    """Measure every rival's implicit accuracy on held-out pairs, with both kinds of noise.

    If inverted states and fresh noise give the same rate, the rate does not depend on the source of the noise.
    """
    rates: dict[str, dict[str, list[float]]] = {
        a: {b: [] for b in NOISE_OF.values()} for a in NOISE_OF
    }
    for rivals in configs:
        inverted = rivals["inversion_dpo"]
        for arm, config in rivals.items():
            trainer = Run.prepare(config).trainer
            assert isinstance(trainer, PreferenceTrainer)
            trainer.prepare()
            trainer.resume()
            cache = PairCache(str(inverted.pairs.cache))
            batch = cache.batch(cache.split(config.pairs.validation)[1], trainer.accelerator.device)
            for other, noise in NOISE_OF.items():
                algorithm = replace(rivals[other].algorithm, timesteps_per_pair=inverted.states)
                update = PreferenceUpdate(
                    trainer.model,
                    algorithm,
                    grid=trainer.update.grid,
                    micro_batch_size=config.training.micro_batch_size,
                    mixed_precision=config.training.mixed_precision,
                    seed=0,
                )
                with lora.policy(trainer.model.denoiser, trainer.policy):
                    means = update.measure(batch, key=(VALIDATION,)).means()
                rates[arm][noise].append(means["accuracy"])
    return {
        arm: {noise: spread(v) for noise, v in by_noise.items()} for arm, by_noise in rates.items()
    }


def figures(subject: Subject, arm: str, configs: list[PreferenceRunConfig]) -> dict[str, Any]:
    """Return the figures of an arm over all seeds, whose runs are finished."""
    summaries = [run_once(config) for config in configs]
    logs = [RunFolder(config.output_dir).read_log() for config in configs]
    rows = [row for log in logs for row in log]
    return {
        "curves": {
            name: [preference_curve(log, s, name) for log, s in zip(logs, summaries, strict=True)]
            for name in ("win_rate", "geneval")
        },
        "win_rate": spread(s["win_rate"]["rate"] for s in summaries),
        "win_rates": [s["win_rate"] for s in summaries],
        "geneval_before": spread(s["geneval_before"] for s in summaries),
        "geneval_final": spread(s["geneval_after"] for s in summaries),
        "precompute_seconds": summaries[0]["precompute_seconds"],
        "updates": spread(s["updates"] for s in summaries),
        "pairs": summaries[0]["pairs"],
        "pairs_per_second": round(median(r["pairs_per_second"] for r in rows), 2),
        "forwards_per_pair": round(median(r["forwards_per_pair"] for r in rows), 2),
        "beta_per_element": summaries[0]["beta_per_element"],
        "overrides": list(ARMS[arm]),
        "recipe": RECIPES[subject.name],
    }


def before_training(subject: Subject) -> dict[str, Any]:
    """Measure the cost of a step and the directions of gradients before training.

    The step's loss and its peak memory beside the weights are measured twice: with the reference's error from the
    cache, and with a forward of the reference, on the same pairs.
    """
    config = subject.configuration("inversion_dpo", 0)
    folder = str(subject.options.work / f"step-{subject.name}")
    trainer = Run.prepare(replace(config, output_dir=folder)).trainer
    assert isinstance(trainer, PreferenceTrainer)
    trainer.prepare()
    return {"step": _step_times(trainer), "gradients": _gradients(subject, trainer)}


def _gradients(subject: Subject, trainer: PreferenceTrainer) -> dict[str, float]:
    """Compare gradients on states with gradients on fresh noise (`gradients.cosines`)."""
    fresh = subject.configuration("diffusion_dpo", 0).algorithm
    return cosines(trainer, fresh, pairs=32 if subject.options.quick else PAIRS)


def _step_times(trainer: PreferenceTrainer) -> dict[str, Any]:
    """Compare a cached gradient with one that has a reference: time ratio and peak bytes."""
    pairs = trainer.order(1)[: trainer.config.training.micro_batch_size]
    batch = trainer.cache.batch(pairs, trainer.accelerator.device)
    calls = [partial(_gradient, trainer, batch, cached=cached) for cached in (True, False)]
    cached_seconds, full_seconds = interleaved(
        calls, trainer.accelerator.device, repeats=STEP_REPEATS
    )
    ratios = [a / b for a, b in zip(cached_seconds, full_seconds, strict=True)]
    allocated = [
        trainer.model.denoiser,
        *(p for p in vars(batch).values() if isinstance(p, Tensor)),
    ]
    peaks = {
        name: peak_bytes(call, allocated, backward=True)
        for name, call in zip(("cached", "with a reference"), calls, strict=True)
    }
    return {"pairs": len(pairs), "ratio": spread(ratios), "peak_bytes": peaks}


def _gradient(trainer: PreferenceTrainer, batch: PreferenceBatch, *, cached: bool) -> None:
    """Compute one gradient and discard it."""
    states = trainer.update.states(batch, (TIMESTEPS, 0))
    if not cached:
        states = replace(states, reference_error=None)
    loss = trainer.update.loss(batch, states, Sums(METRICS, batch.latents.device))
    with attention(batch.latents.device):
        loss.mean().backward()
    trainer.optimizer.zero_grad()


def run(options: BenchOptions) -> dict[str, Any]:
    """Run all arms of all models over all seeds.

    The option `arms` selects among names of the form "MODEL ARM".
    """
    selected = options.select(f"{model} {arm}" for model in RECIPES for arm in ARMS)
    models: dict[str, Any] = {}
    for name in RECIPES:
        arms = [arm for arm in ARMS if f"{name} {arm}" in selected]
        if not arms:
            continue
        subject = Subject(name, options)
        result: dict[str, Any] = {"pairs": subject.make_pairs()}
        result |= measure(subject, arms, options.seeds)
        if "inversion_dpo" in arms:
            result |= before_training(subject)
        result["times"] = times(result["arms"])
        models[name] = result
    headline = {
        "win_rate": {
            name: {arm: a["win_rate"]["median"] for arm, a in model["arms"].items()}
            for name, model in models.items()
        },
        "time_ratio_to_match_diffusion_dpo": {
            name: model["times"]["seconds"]["median to match"]
            for name, model in models.items()
            if model["times"]
        },
        "step_time_ratio_cached": {
            name: model["step"]["ratio"]["median"]
            for name, model in models.items()
            if "step" in model
        },
    }
    for model in models.values():
        for arm in model["arms"].values():
            arm["curves"] = {k: [vars(c) for c in curves] for k, curves in arm["curves"].items()}
    return {"headline": headline, "seconds": SECONDS, "models": models}


def times(arms: dict[str, Any]) -> dict[str, Any]:
    """Compare the training times of Inversion-DPO and Diffusion-DPO by unit and seed.

    The result has the time ratio to match the other's best win rate, and the speedup at the highest rate that both
    reach. Win rates are noisy: a best one is partly chance.
    """
    if not set(NOISE_OF) <= set(arms):
        return {}
    fast, slow = (arms[arm]["curves"]["win_rate"] for arm in NOISE_OF)
    result = {}
    for unit in UNITS:
        ratios = [ratio_to_match(a, b, unit) for a, b in zip(fast, slow, strict=True)]
        defined = [r for r in ratios if not math.isnan(r)]
        result[unit] = {
            "to match": [finite(r) for r in ratios],
            "median to match": finite(median(defined)) if defined else None,
            "speedup": [finite(speedup(a, b, unit)) for a, b in zip(fast, slow, strict=True)],
        }
    return result


def ratio_to_match(fast: Curve, slow: Curve, unit: str) -> float:
    """Return the cost ratio of two runs at the best score of `slow`.

    The ratio is the cost of `fast` over the cost of `slow`. Return infinity if `fast` never reaches it, and NaN if
    `slow` gains nothing.
    """
    best = max(slow.score)
    fast_cost, slow_cost = fast.to_reach(best, unit), slow.to_reach(best, unit)
    if not slow_cost:
        return math.nan
    return math.inf if fast_cost is None else fast_cost / slow_cost
