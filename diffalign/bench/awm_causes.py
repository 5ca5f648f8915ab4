"""Where AWM's speed comes from: what an update costs, and how much of its gradient is signal."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor

from diffalign.bench.awm_arms import AWM, COSTS, NOISES, RIVALS, Arm, configuration
from diffalign.bench.policy_gradients import direction, gradients, load_policy, signal
from diffalign.bench.record import BenchOptions, spread
from diffalign.bench.second_opinion import weights_left
from diffalign.config import ForwardProcessConfig, RunConfig, to_dict
from diffalign.quantization.latency import interleaved
from diffalign.training.online import OnlineTrainer
from diffalign.training.run import Run

UPDATES = 5
"""Of each arm, timed."""
ARMS = {
    "costs": {"awm": Arm(AWM), **RIVALS, **COSTS},
    "signals": {"awm": Arm(AWM), **RIVALS, **NOISES},
}
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


CAUSES = {"costs": costs, "signals": signals}


def key(name: str, options: BenchOptions) -> Any:
    """What a cause depends on: every arm's configuration, and the policy that gradients are of."""
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
