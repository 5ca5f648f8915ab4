"""Measure the causes of AWM's speed, and the relations that its policies learn.

Costs are seconds and forwards per update; signals are the share of a gradient that is not noise.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor

from benchmarks.awm.arms import AWM, COSTS, LONG, NOISES, RIVALS, Arm, configuration
from benchmarks.awm.gradients import direction, gradients, load_policy, signal
from benchmarks.common.record import BenchOptions, spread
from benchmarks.common.second_opinion import evaluate_lora, lora_left, weights_left
from diffalign.config import ForwardProcessConfig, RunConfig, to_dict
from diffalign.data.prompts import load_prompts
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.quantization.latency import interleaved
from diffalign.scripts.shapes.relations import colours, positions
from diffalign.shapes.verifier import detect
from diffalign.training.run import Run
from diffalign.types import no_reward

UPDATES = 5
"""Updates of each arm that are timed."""
ARMS = {
    "costs": {"awm": Arm(AWM), **RIVALS, **COSTS},
    "signals": {"awm": Arm(AWM), **RIVALS, **NOISES},
}
IMAGES_PER_TASK = 512
"""Images per task whose relations are examined."""
BASE = "base"
MEASURES = {"position": positions, "color_attr": colours}
BATCHES = {"signal": 24, "noise": 6}
"""Rollouts per arm: the common part of two gradients needs many, the gradients' lengths need few."""


def costs(options: BenchOptions) -> dict[str, Any]:
    """Time one update of every arm, interleaved, relative to AWM's, and count forwards per image."""
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
    """Compare gradients of the reward alone at the policy of AWM's first finished run.

    Distances are switched off. The arms are the rivals, and other ways to sample timesteps and noise.
    """
    grads_by_arm: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for name, arm in ARMS["signals"].items():
        config = _reward_alone(configuration(f"signal {name}", arm, 0, options))
        trainer = _trainer(config)
        load_policy(trainer, options.folder("awm", 0) / "checkpoints")
        batches = 3 if options.quick else BATCHES["noise" if name in NOISES else "signal"]
        grads_by_arm[name] = gradients(trainer, batches=batches)
        awm_gradients = grads_by_arm["awm"][:batches]
        estimate = signal(grads_by_arm[name], images=config.rollout.images_per_update)
        table[name] = {
            "batches": batches,
            "square_over_awm": _rounded(
                estimate.square / float(awm_gradients.square().sum(1).mean())
            ),
            "cosine": _rounded(estimate.cosine),
            "cosine_error": _rounded(estimate.error),
            "images_to_signal": _rounded(estimate.images),
            "direction": _rounded(direction(awm_gradients, grads_by_arm[name])),
            "overrides": list(arm.overrides),
        }
    return table


def relations(options: BenchOptions) -> dict[str, Any]:
    """Return how often images that show both objects have the right relation or colour owner.

    The policies are the base model's, AWM's first run's and the hour-long run's, if that run is finished.
    """
    table: dict[str, Any] = {}
    for name, config in _policies(options).items():
        setting = replace(
            config.evaluation, images_per_task=6 if options.quick else IMAGES_PER_TASK
        )
        lora = None if name == BASE else lora_left(config)
        prompts = load_prompts(config.prompts.evaluation)
        table[name] = {}
        for task, measure in MEASURES.items():
            task_prompts = [p for p in prompts if p.task == task]
            evaluation = evaluate_lora(config.model.name, lora, task_prompts, no_reward, setting)
            images = evaluation.images.permute(0, 2, 3, 1).contiguous().numpy()
            table[name][task] = measure(list(images), evaluation.prompts, detect)
    return table


def _policies(options: BenchOptions) -> dict[str, RunConfig]:
    """Return the runs whose policies are examined: the base model's and the finished ones."""
    arms = {BASE: Arm(AWM), "awm": Arm(AWM), **LONG}
    configs = {name: configuration(name, arm, 0, options) for name, arm in arms.items()}
    return {name: c for name, c in configs.items() if name == BASE or lora_left(c).is_dir()}


CAUSES = {"costs": costs, "signals": signals, "relations": relations}


def key(name: str, options: BenchOptions) -> Any:
    """Return everything that the result of a cause depends on: configurations, counts and weights."""
    if name == "relations":
        policies = _policies(options).items()
        evaluations = {
            n: [c.model.name, c.prompts.evaluation, to_dict(c.evaluation), weights_left(c)]
            for n, c in policies
        }
        return [evaluations, IMAGES_PER_TASK]
    runs = {n: to_dict(configuration(n, arm, 0, options)) for n, arm in ARMS[name].items()}
    for run in runs.values():
        del run["output_dir"]
    if name == "costs":
        return [runs, UPDATES]
    return [runs, BATCHES, weights_left(configuration("awm", Arm(AWM), 0, options))]


def _reward_alone(config: RunConfig) -> RunConfig:
    """Return the run without distances and without compilation, since no time is measured."""
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
    """Round to four significant digits."""
    return None if value is None else float(f"{value:.4g}")
