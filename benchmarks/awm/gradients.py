"""How much of a policy gradient is signal: gradients of independent rollouts at one and the same policy.

Of B updates' gradients g_b, each over n images, the mean product of two different ones is an unbiased estimate of the
squared length of the expected gradient, and the mean square of one is that and the noise. From these follow the number
of images after which the signal is as large as the noise and, where expectations are known to be equal, how much less
noise one way of drawing has than another.
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
    """Of B gradients over n images each. `square`: mean squared length; `cosine`: expected of two of them, with the
    jackknife's standard error; `images`: so many until signal and noise are equal, None where none was seen."""

    square: float
    cosine: float
    error: float
    images: float | None


def load_policy(trainer: OnlineTrainer, folder: Path) -> None:
    """Make the newest checkpoint of a run's folder the policy, and the lagged and the averaged one."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    state = checkpoint.load(newest)[1][lora.CURRENT]
    for name in (lora.CURRENT, *trainer.policies):
        lora.load_adapter_state(trainer.model.denoiser, name, state)


def gradients(trainer: OnlineTrainer, *, batches: int) -> Tensor:
    """(B, P) gradients of so many updates, each with prompts and images of its own; none is applied."""
    rows = []
    for number in range(1, batches + 1):
        plan = trainer.plan(number)
        batch, _ = trainer.make_batch(plan, trainer.rollout(plan, number))
        trainer.optimizer.zero_grad()
        if batch.kept:
            trainer.policy_update.accumulate(batch, update=number)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters]
        rows.append(torch.cat([g.flatten().float() for g in grads]))
    trainer.optimizer.zero_grad()
    return torch.stack(rows)


def signal(found: Tensor, *, images: int) -> Signal:
    """What gradients (B, P) over `images` images each have in common."""
    products = found.double() @ found.double().T
    count = len(products)
    every = torch.arange(count)
    apart = torch.stack([_cosine(products[every != i][:, every != i]) for i in range(count)])
    cosine = float(_cosine(products))
    return Signal(
        square=float(products.diagonal().mean()),
        cosine=cosine,
        error=float(((count - 1) / count * (apart - apart.mean()).square().sum()).sqrt()),
        images=images * (1 - cosine) / cosine if cosine > 0 else None,
    )


def direction(a: Tensor, b: Tensor) -> float | None:
    """Cosine of the gradients that (B, P) and (B, P) are of in expectation, free of their noise: from products of
    different rollouts. None where one of them has no signal."""
    across = _between(a.double() @ b.double().T)
    sizes = [_between(x.double() @ x.double().T) for x in (a, b)]
    return float(across / (sizes[0] * sizes[1]).sqrt()) if min(sizes) > 0 else None


def _cosine(products: Tensor) -> Tensor:
    return _between(products) / products.diagonal().mean()


def _between(products: Tensor) -> Tensor:
    """Mean over different rollouts."""
    count = len(products)
    return (products.sum() - products.diagonal().sum()) / (count * (count - 1))
