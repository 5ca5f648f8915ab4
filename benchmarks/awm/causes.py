"""Where AWM's speed comes from, what an update costs and how much of its gradient is signal; and where its score ends:
what policies know of relations."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor

from benchmarks.awm.arms import AWM, COSTS, LONG, NOISES, RIVALS, Arm, configuration
from benchmarks.awm.gradients import direction, gradients, load_policy, signal
from benchmarks.awm.relations import colours, positions
from benchmarks.common.record import BenchOptions, spread
from benchmarks.common.second_opinion import evaluate_lora, lora_left, weights_left
from diffalign.config import ForwardProcessConfig, RunConfig, to_dict
from diffalign.data.prompts import load_prompts
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.quantization.latency import interleaved
from diffalign.shapes.verifier import detect
from diffalign.training.run import Run
from diffalign.types import no_reward

UPDATES = 5
"""Of each arm, timed."""
ARMS = {
    "costs": {"awm": Arm(AWM), **RIVALS, **COSTS},
    "signals": {"awm": Arm(AWM), **RIVALS, **NOISES},
}
ASKED = 512
"""Images of each task that are looked at for relations."""
BASE = "base"
TOLD = {"position": positions, "color_attr": colours}
BATCHES = {"signal": 24, "noise": 6}
"""Rollouts: of what two gradients have in common little is seen in few; of their lengths much."""


def costs(options: BenchOptions) -> dict[str, Any]:
    """Seconds of an update over AWM's, turn and turn about, and forwards of the denoiser for an image."""
    arms = ARMS["costs"]
    trainers = [_trainer(configuration(f"cost {n}", arm, 0, options)) for n, arm in arms.items()]
    rows: list[list[dict[str, Any]]] = [[] for _ in trainers]
    calls = [
        lambda t=t, log=log: log.append(t.train_update())
        for t, log in zip(trainers, rows, strict=True)
    ]
    times = interleaved(
        calls, trainers[0].accelerator.device, repeats=2 if options.quick else UPDATES
    )
    return {
        name: {
            "seconds": spread(t / base for t, base in zip(seconds, times[0], strict=True)),
            "forwards_per_image": round(median(r["forwards_per_image"] for r in done), 2),
            "overrides": list(arm.overrides),
        }
        for (name, arm), seconds, done in zip(arms.items(), times, rows, strict=True)
    }


def signals(options: BenchOptions) -> dict[str, Any]:
    """Gradients of the reward alone, without distances, at the policy that AWM's first run ended with: of the rivals,
    and of ways to draw timesteps and noise."""
    found: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for name, arm in ARMS["signals"].items():
        config = _reward_alone(configuration(f"signal {name}", arm, 0, options))
        trainer = _trainer(config)
        load_policy(trainer, options.folder("awm", 0) / "checkpoints")
        batches = 3 if options.quick else BATCHES["noise" if name in NOISES else "signal"]
        found[name] = gradients(trainer, batches=batches)
        ours = found["awm"][:batches]
        seen = signal(found[name], images=config.rollout.images_per_update)
        table[name] = {
            "batches": batches,
            "square_over_awm": _rounded(seen.square / float(ours.square().sum(1).mean())),
            "cosine": _rounded(seen.cosine),
            "cosine_error": _rounded(seen.error),
            "images_to_signal": _rounded(seen.images),
            "direction": _rounded(direction(ours, found[name])),
            "overrides": list(arm.overrides),
        }
    return table


def relations(options: BenchOptions) -> dict[str, Any]:
    """Of the base, of AWM's first run and of the hour's, where that was made: whether a relation or a colour's owner is
    right, in images that have both objects."""
    table: dict[str, Any] = {}
    for name, config in _policies(options).items():
        each = replace(config.evaluation, images_per_task=6 if options.quick else ASKED)
        lora = None if name == BASE else lora_left(config)
        prompts = load_prompts(config.prompts.evaluation)
        table[name] = {}
        for task, tell in TOLD.items():
            asked = [p for p in prompts if p.task == task]
            found = evaluate_lora(config.model.name, lora, asked, no_reward, each)
            images = found.images.permute(0, 2, 3, 1).contiguous().numpy()
            table[name][task] = tell(list(images), found.prompts, detect)
    return table


def _policies(options: BenchOptions) -> dict[str, RunConfig]:
    """Runs whose policies are looked at: the base's, and those that were made."""
    known = {BASE: Arm(AWM), "awm": Arm(AWM), **LONG}
    configs = {name: configuration(name, arm, 0, options) for name, arm in known.items()}
    return {name: c for name, c in configs.items() if name == BASE or lora_left(c).is_dir()}


CAUSES = {"costs": costs, "signals": signals, "relations": relations}


def key(name: str, options: BenchOptions) -> Any:
    """What a cause depends on: every arm's configuration, and the policies that gradients or images are of."""
    if name == "relations":
        policies = _policies(options).items()
        drawn = {
            n: [c.model.name, c.prompts.evaluation, to_dict(c.evaluation), weights_left(c)]
            for n, c in policies
        }
        return [drawn, ASKED]
    runs = {n: to_dict(configuration(n, arm, 0, options)) for n, arm in ARMS[name].items()}
    for run in runs.values():
        del run["output_dir"]
    if name == "costs":
        return [runs, UPDATES]
    return [runs, BATCHES, weights_left(configuration("awm", Arm(AWM), 0, options))]


def _reward_alone(config: RunConfig) -> RunConfig:
    """Without distances and, as no time is measured, without compilation."""
    algorithm = replace(config.algorithm, kl_beta=0.0)
    if isinstance(algorithm, ForwardProcessConfig):
        algorithm = replace(algorithm, ema_kl_beta=0.0)
    return replace(config, algorithm=algorithm, model=replace(config.model, compile=False))


def _trainer(config: RunConfig) -> OnlineTrainer:
    trainer = Run.prepare(config).trainer
    assert isinstance(trainer, OnlineTrainer)
    trainer.prepare()
    return trainer


def _rounded(value: float | None) -> float | None:
    """Four digits that say something."""
    return None if value is None else float(f"{value:.4g}")
