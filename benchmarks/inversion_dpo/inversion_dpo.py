"""Inversion-DPO against Diffusion-DPO, its own released form, and training on winners alone.

All arms have the same pairs, model, adapter and machine, and the same seconds: what encoding and inverting took an arm
is taken from its training. Pairs are the model's own images, whose states were kept while they were drawn; one arm
inverts them nonetheless, as images of others must be. Win rates are those of held-out prompts against the base, image
by image from the same noise.
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
from diffalign.training.run import Run, prepare_model
from diffalign.training.run_folder import RunFolder
from diffalign.training.sums import Sums
from diffalign.types import PreferenceBatch

SECONDS = 180.0
"""Of precomputing and training together."""
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
        "--training.num_updates=20",  # enough: its gradient is exactly zero
    ),
    "sft": (
        *DIFFUSION_DPO,
        "--algorithm.loss_type=sft",
        "--algorithm.timesteps_per_pair=2",
        "--optimizer.learning_rate=2e-5",
        "--training.eval_every=200",  # its updates are short
    ),
}
"""What each changes in the recipe of its model. Rates and betas are the best of those tried with one seed
(benchmarks/results/inversion-dpo-tuning.json), the same for Diffusion-DPO; `released` takes ours."""
NOISE_OF = {"inversion_dpo": "recorded states", "diffusion_dpo": "fresh noise"}
"""The two that are compared most closely, and what each trains on."""
UNITS = ("seconds", "training")
"""With what was precomputed, and without: a cache serves many runs."""
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
        """Of the model's recipe; another `algorithm.type` does not inherit it."""
        config = load(RECIPES[self.name])
        assert isinstance(config, PreferenceRunConfig)
        return config.algorithm.beta

    def make_pairs(self) -> list[str]:
        """`diffalign pairs`, as a user would; returns its arguments. Images that are there are kept."""
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
        """The run of one arm and seed, training for `seconds`; its folder is resumed when it is there."""
        kept = "plain" if DIFFUSION_DPO[0] in ARMS[arm] else "recorded"
        kept = arm if arm == "inverted" else kept
        overrides = [
            f"--output_dir={self.options.folder(f'{self.name} {arm}', seed)}",
            f"--pairs.source={self.pairs}",
            f"--pairs.cache={self.options.work / f'cache-{self.name}-{kept}'}",
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
        config = load(RECIPES[self.name], overrides)
        assert isinstance(config, PreferenceRunConfig)
        return config

    def precomputed(self, arms: list[str]) -> dict[str, float]:
        """Seconds that each arm's cache took; caches that are not there are made."""
        configs = {arm: self.configuration(arm, 0) for arm in arms}
        accelerator = trackers.make_accelerator(configs[arms[0]])
        model = prepare_model(configs[arms[0]], accelerator.device)  # all arms have the same
        return {
            arm: float(precompute(config, model, accelerator).manifest["seconds"])
            for arm, config in configs.items()
        }


def preference_curve(log: list[dict[str, Any]], summary: dict[str, Any], name: str) -> Curve:
    """Of one run: what was reached after how many seconds, those of precomputing among them, and after how many of
    training."""

    def read(found: dict[str, Any]) -> float:
        return found["win_rate"]["rate"] if name == "win_rate" else found["tasks"]["overall"]

    spent = summary["precompute_seconds"]
    start = 0.5 if name == "win_rate" else read(summary["before"])
    found = evaluations(log, {**summary["after"], "win_rate": summary["win_rate"]})
    trained = [0.0, *(log[i]["seconds"] for i, _ in found)]
    return Curve(
        [start, start, *(read(evaluation) for _, evaluation in found)],
        {"seconds": [0.0, *(spent + t for t in trained)], "training": [0.0, *trained]},
    )


def measure(subject: Subject, arms: list[str], seeds: int) -> dict[str, Any]:
    """All arms, turn and turn about: a machine that slows down slows all of them; and what each learned of the other's
    question."""
    left = {arm: max(SECONDS - spent, 1.0) for arm, spent in subject.precomputed(arms).items()}
    configs = {
        arm: [subject.configuration(arm, seed, seconds=left[arm]) for seed in range(seeds)]
        for arm in arms
    }
    for seed in range(seeds):
        for arm in arms:
            run_once(configs[arm][seed])
    found: dict[str, Any] = {"arms": {arm: figures(subject, arm, configs[arm]) for arm in arms}}
    if set(NOISE_OF) <= set(arms):
        found["implicit_accuracy"] = crossed(
            [{a: configs[a][i] for a in NOISE_OF} for i in range(seeds)]
        )
    return found


def crossed(configs: list[dict[str, PreferenceRunConfig]]) -> dict[str, Any]:
    """Implicit accuracy on held-out pairs of what each rival trained, on inverted states and with fresh noise: where
    the two agree, the source of the noise does not show in this rate."""
    rates: dict[str, dict[str, list[float]]] = {
        a: {b: [] for b in NOISE_OF.values()} for a in NOISE_OF
    }
    for of_seed in configs:
        inverted = of_seed["inversion_dpo"]
        for arm, config in of_seed.items():
            trainer = Run.prepare(config).trainer
            assert isinstance(trainer, PreferenceTrainer)
            trainer.prepare()
            trainer.resume()
            cache = PairCache(str(inverted.pairs.cache))
            batch = cache.batch(cache.split(config.pairs.validation)[1], trainer.accelerator.device)
            for other, noise in NOISE_OF.items():
                asked = replace(of_seed[other].algorithm, timesteps_per_pair=inverted.states)
                update = PreferenceUpdate(
                    trainer.model,
                    asked,
                    grid=trainer.update.grid,
                    micro_batch_size=config.training.micro_batch_size,
                    mixed_precision=config.training.mixed_precision,
                    seed=0,
                )
                with lora.policy(trainer.model.denoiser, trainer.policy):
                    means = update.measure(batch, key=(VALIDATION,)).means()
                rates[arm][noise].append(means["accuracy"])
    return {arm: {noise: spread(v) for noise, v in found.items()} for arm, found in rates.items()}


def figures(subject: Subject, arm: str, configs: list[PreferenceRunConfig]) -> dict[str, Any]:
    """Of all seeds of an arm, whose runs are finished."""
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
    """Seconds of a gradient with the reference's error from the cache over those with a forward of the reference, on
    the same pairs, bytes at the peak of either beside the weights; and where gradients point."""
    config = subject.configuration("inversion_dpo", 0)
    folder = str(subject.options.work / f"step-{subject.name}")
    trainer = Run.prepare(replace(config, output_dir=folder)).trainer
    assert isinstance(trainer, PreferenceTrainer)
    trainer.prepare()
    return {"step": _step_times(trainer), "gradients": _gradients(subject, trainer)}


def _gradients(subject: Subject, trainer: PreferenceTrainer) -> dict[str, float]:
    """Whether states point where fresh noise does (`pair_gradients.cosines`)."""
    fresh = subject.configuration("diffusion_dpo", 0).algorithm
    return cosines(trainer, fresh, pairs=32 if subject.options.quick else PAIRS)


def _step_times(trainer: PreferenceTrainer) -> dict[str, Any]:
    """Of a gradient from the cache over one with the reference in it, and bytes at the peak of both."""
    pairs = trainer.chosen(1)[: trainer.config.training.micro_batch_size]
    batch = trainer.cache.batch(pairs, trainer.accelerator.device)
    calls = [partial(_gradient, trainer, batch, cached=cached) for cached in (True, False)]
    ours, plain = interleaved(calls, trainer.accelerator.device, repeats=STEP_REPEATS)
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    known = [trainer.model.denoiser, *(p for p in vars(batch).values() if isinstance(p, Tensor))]
    peaks = {
        name: peak_bytes(call, known, backward=True)
        for name, call in zip(("cached", "with a reference"), calls, strict=True)
    }
    return {"pairs": len(pairs), "ratio": spread(ratios), "peak_bytes": peaks}


def _gradient(trainer: PreferenceTrainer, batch: PreferenceBatch, *, cached: bool) -> None:
    """One, and it is forgotten."""
    question = trainer.update.ask(batch, (TIMESTEPS, 0))
    if not cached:
        question = replace(question, reference_error=None)
    loss = trainer.update.loss(batch, question, Sums(METRICS, batch.latents.device))
    with attention(batch.latents.device):
        loss.mean().backward()
    trainer.optimizer.zero_grad()


def run(options: BenchOptions) -> dict[str, Any]:
    """All arms of all models over all seeds; `options.arms` chooses among "MODEL ARM"."""
    chosen = options.chosen(f"{model} {arm}" for model in RECIPES for arm in ARMS)
    models: dict[str, Any] = {}
    for name in RECIPES:
        arms = [arm for arm in ARMS if f"{name} {arm}" in chosen]
        if not arms:
            continue
        subject = Subject(name, options)
        found: dict[str, Any] = {"pairs": subject.make_pairs()}
        found |= measure(subject, arms, options.seeds)
        if "inversion_dpo" in arms:
            found |= before_training(subject)
        found["times"] = times(found["arms"])
        models[name] = found
    headline = {
        "win_rate": {
            name: {arm: a["win_rate"]["median"] for arm, a in found["arms"].items()}
            for name, found in models.items()
        },
        "time_ratio_to_match_diffusion_dpo": {
            name: found["times"]["seconds"]["median to match"]
            for name, found in models.items()
            if found["times"]
        },
        "step_time_ratio_cached": {
            name: found["step"]["ratio"]["median"]
            for name, found in models.items()
            if "step" in found
        },
    }
    for found in models.values():
        for arm in found["arms"].values():
            arm["curves"] = {k: [vars(c) for c in curves] for k, curves in arm["curves"].items()}
    return {"headline": headline, "seconds": SECONDS, "models": models}


def times(arms: dict[str, Any]) -> dict[str, Any]:
    """Of Inversion-DPO and Diffusion-DPO, seed by seed, by unit: the time to match the other's best win rate, and how
    much sooner the highest rate is reached that both reach. Win rates are noisy: a best one is partly luck."""
    if not set(NOISE_OF) <= set(arms):
        return {}
    ours, theirs = (arms[arm]["curves"]["win_rate"] for arm in NOISE_OF)
    found = {}
    for unit in UNITS:
        ratios = [ratio_to_match(a, b, unit) for a, b in zip(ours, theirs, strict=True)]
        decided = [r for r in ratios if not math.isnan(r)]
        found[unit] = {
            "to match": [finite(r) for r in ratios],
            "median to match": finite(median(decided)) if decided else None,
            "speedup": [finite(speedup(a, b, unit)) for a, b in zip(ours, theirs, strict=True)],
        }
    return found


def ratio_to_match(ours: Curve, theirs: Curve, unit: str) -> float:
    """What the first takes until the best score of the second, over what the second took. Infinite where it does not
    get there, NaN where there was nothing to match."""
    best = max(theirs.score)
    here, there = ours.to_reach(best, unit), theirs.to_reach(best, unit)
    if not there:
        return math.nan
    return math.inf if here is None else here / there
