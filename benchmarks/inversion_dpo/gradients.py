"""Compare the directions of preference losses at the reference, before training.

The gradients use inverted or recorded states, or fresh noise. At the reference the gradient of every loss is a
constant times the winner's minus the loser's error gradient, so directions can be compared before training.
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
"""Seeds of fresh noise. Their cosine with each other bounds every other cosine."""


def cosines(
    trainer: PreferenceTrainer, fresh: PreferenceAlgorithmConfig, *, pairs: int = PAIRS
) -> dict[str, float]:
    """Return cosines between mean gradients over the first pairs.

    The gradients are on `states`, `fresh noise` and `other noise`, with as many timesteps per pair as there are
    states. The result also has the cosines between the winners' and the losers' parts of the first two.
    """
    config = trainer.config
    count = config.states
    indices = trainer.pairs[:pairs]
    on_states = _update(trainer, replace(config.algorithm, timesteps_per_pair=count))
    noised = _update(trainer, replace(fresh, timesteps_per_pair=count))
    parts = {
        "states": _sides(trainer, on_states, indices, NOISE[0]),
        "fresh noise": _sides(trainer, noised, indices, NOISE[0]),
        "other noise": _sides(trainer, noised, indices, NOISE[1]),
    }
    whole = {name: winner + loser for name, (winner, loser) in parts.items()}
    cosine_of = {f"{a} / {b}": _cosine(whole[a], whole[b]) for a, b in combinations(whole, 2)}
    for name in ("states", "fresh noise"):
        cosine_of[f"{name}: winners / losers"] = _cosine(*parts[name])
    return {name: round(value, 3) for name, value in cosine_of.items()}


def _update(trainer: PreferenceTrainer, algorithm: PreferenceAlgorithmConfig) -> PreferenceUpdate:
    c = trainer.config.training
    return PreferenceUpdate(
        trainer.model,
        algorithm,
        grid=trainer.update.grid,
        micro_batch_size=c.micro_batch_size,
        mixed_precision=c.mixed_precision,
        seed=0,
    )


def _sides(
    trainer: PreferenceTrainer, update: PreferenceUpdate, indices: list[int], key: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the winners' mean error and of the losers' negated mean error."""
    sides = []
    for side, sign in ((0, 1.0), (1, -1.0)):
        trainer.optimizer.zero_grad()
        for start in range(0, len(indices), update.micro_batch_size):
            part = indices[start : start + update.micro_batch_size]
            batch = trainer.cache.batch(part, trainer.accelerator.device)
            states = update.states(batch, (TIMESTEPS, key))
            target = states.by_image(states.batch.target)
            error = (update.predict(states) - target).square().flatten(2)
            with attention(batch.latents.device):
                (sign * error[:, side].mean(1).sum() / len(indices)).backward()
        grads = [p.grad for g in trainer.optimizer.param_groups for p in g["params"]]
        sides.append(torch.cat([g.flatten().double() for g in grads if g is not None]))
    trainer.optimizer.zero_grad()
    return sides[0], sides[1]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
