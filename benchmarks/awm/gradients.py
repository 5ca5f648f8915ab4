"""Estimate the share of a policy gradient that is signal.

The estimate uses independent rollouts at one policy. Let g_b be the gradients of B updates, each over n images. The
mean product of two different gradients is an unbiased estimate of the squared length of the expected gradient; the
mean square of one gradient also contains the noise. The two give the number of images at which signal and noise are
equal. Where two ways of sampling have the same expected gradient, they also give the ratio of their noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign import lora
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.training import checkpoint


@dataclass(frozen=True)
class Signal:
    """Signal and noise of B gradients over n images each.

    Attributes:
        square: mean squared length of a gradient.
        cosine: expected cosine of two independent gradients.
        error: jackknife standard error of the cosine.
        images: images at which signal and noise are equal; None if no signal was measured.
    """

    square: float
    cosine: float
    error: float
    images: float | None


def load_policy(trainer: OnlineTrainer, folder: Path) -> None:
    """Load the newest checkpoint of a run folder as the current, lagged and averaged policy."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    state = checkpoint.load(newest)[1][lora.CURRENT]
    for name in (lora.CURRENT, *trainer.policies):
        lora.load_adapter_state(trainer.model.denoiser, name, state)


def gradients(trainer: OnlineTrainer, *, batches: int) -> Tensor:
    """Return the gradients (B, P) of `batches` updates with new prompts and images; apply none."""
    rows = []
    for number in range(1, batches + 1):
        plan = trainer.plan(number)
        batch, _ = trainer.make_batch(plan, trainer.rollout(plan, number))
        trainer.optimizer.zero_grad()
        if batch.trained:
            trainer.policy_update.accumulate(batch, update=number)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters]
        rows.append(torch.cat([g.flatten().float() for g in grads]))
    trainer.optimizer.zero_grad()
    return torch.stack(rows)


def signal(grads: Tensor, *, images: int) -> Signal:
    """Estimate the signal that gradients (B, P), over `images` images each, have in common."""
    products = grads.double() @ grads.double().T
    count = len(products)
    every = torch.arange(count)
    jackknife = torch.stack([_cosine(products[every != i][:, every != i]) for i in range(count)])
    cosine = float(_cosine(products))
    return Signal(
        square=float(products.diagonal().mean()),
        cosine=cosine,
        error=float(((count - 1) / count * (jackknife - jackknife.mean()).square().sum()).sqrt()),
        images=images * (1 - cosine) / cosine if cosine > 0 else None,
    )


def direction(a: Tensor, b: Tensor) -> float | None:
    """Return the cosine of two expected gradients, from samples (B, P) of each.

    Only products of different rollouts enter, so the noise cancels in expectation. Return None if one of the two has
    no measurable signal.
    """
    across = _between(a.double() @ b.double().T)
    sizes = [_between(x.double() @ x.double().T) for x in (a, b)]
    return float(across / (sizes[0] * sizes[1]).sqrt()) if min(sizes) > 0 else None


def _cosine(products: Tensor) -> Tensor:
    return _between(products) / products.diagonal().mean()


def _between(products: Tensor) -> Tensor:
    """Return the mean product of different rollouts."""
    count = len(products)
    return (products.sum() - products.diagonal().sum()) / (count * (count - 1))
