"""Where preference losses point: gradients at the reference, of inverted or recorded states and of fresh noise.

At the reference every loss has the gradient of the winner's error less the loser's, times a constant, so their
directions can be compared before anything is trained.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from diffalign.config import PreferenceAlgorithmConfig
from diffalign.core.precision import attention
from diffalign.core.seeds import TIMESTEPS
from diffalign.methods.preference.trainer import PreferenceTrainer
from diffalign.methods.preference.update import PreferenceUpdate

PAIRS = 384
NOISE = (1, 2)
"""Draws of fresh noise: what one has in common with the other is as much as anything can have with it."""


def cosines(
    trainer: PreferenceTrainer, fresh: PreferenceAlgorithmConfig, *, pairs: int = PAIRS
) -> dict[str, float]:
    """Cosines between mean gradients over the first pairs, each at as many timesteps as there are states: of `states`,
    `fresh noise` and `other noise`; and between the winners' and the losers' parts of the first two."""
    config = trainer.config
    count = config.states
    chosen = trainer.pairs[:pairs]
    on_states = _update(trainer, replace(config.algorithm, timesteps_per_pair=count))
    noised = _update(trainer, replace(fresh, timesteps_per_pair=count))
    parts = {
        "states": _sides(trainer, on_states, chosen, NOISE[0]),
        "fresh noise": _sides(trainer, noised, chosen, NOISE[0]),
        "other noise": _sides(trainer, noised, chosen, NOISE[1]),
    }
    whole = {name: winner + loser for name, (winner, loser) in parts.items()}
    found = {f"{a} / {b}": _cosine(whole[a], whole[b]) for a, b in combinations(whole, 2)}
    for name in ("states", "fresh noise"):
        found[f"{name}: winners / losers"] = _cosine(*parts[name])
    return {name: round(value, 3) for name, value in found.items()}


def _update(trainer: PreferenceTrainer, asked: PreferenceAlgorithmConfig) -> PreferenceUpdate:
    c = trainer.config.training
    return PreferenceUpdate(
        trainer.model,
        asked,
        grid=trainer.update.grid,
        micro_batch_size=c.micro_batch_size,
        mixed_precision=c.mixed_precision,
        seed=0,
    )


def _sides(
    trainer: PreferenceTrainer, update: PreferenceUpdate, chosen: list[int], key: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the winners' mean error and of the losers', negated."""
    found = []
    for side, sign in ((0, 1.0), (1, -1.0)):
        trainer.optimizer.zero_grad()
        for start in range(0, len(chosen), update.micro_batch_size):
            part = chosen[start : start + update.micro_batch_size]
            batch = trainer.cache.batch(part, trainer.accelerator.device)
            question = update.ask(batch, (TIMESTEPS, key))
            error = (update.predict(batch, question) - question.target).square().flatten(2)
            with attention(batch.latents.device):
                (sign * error[:, side].mean(1).sum() / len(chosen)).backward()
        grads = [p.grad for g in trainer.optimizer.param_groups for p in g["params"]]
        found.append(torch.cat([g.flatten().double() for g in grads if g is not None]))
    trainer.optimizer.zero_grad()
    return found[0], found[1]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
