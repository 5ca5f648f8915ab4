"""Count the cost of an update in forwards of the denoiser.

In this unit algorithms can be compared on any machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffalign.pipelines.compiled import batch_rows

BACKWARD = 1.2
"""Cost of a backward through a frozen base model to its LoRA, in forwards.

It computes the gradient of the activations, and hardly any gradient of weights.
"""


class ForwardCounter:
    """Counter of the rows in a denoiser's forwards, with the cost of their backwards.

    Rows that pad a compiled batch are not counted.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self._total = 0.0
        denoiser.register_forward_pre_hook(self._count, with_kwargs=True, prepend=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = batch_rows(args, kwargs)
        cost = 1.0
        if torch.is_grad_enabled():
            recomputed = getattr(self.denoiser, "is_gradient_checkpointing", False)
            cost += BACKWARD + float(recomputed)
        self._total += rows * cost

    def take(self) -> float:
        """Return the number of forwards since the last call."""
        total, self._total = self._total, 0.0
        return total
