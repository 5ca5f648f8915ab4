"""Sums of gradients and of metrics over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.core.precision import attention


class Sums:
    """Sums and counts of named metrics, which stay on the device until they are read."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.table = torch.zeros(len(names), 2, device=device)
        self.names = list(names)

    def add(self, name: str, values: Tensor) -> None:
        """Add the values (B,) of a metric."""
        row = self.table[self.names.index(name)]
        row += torch.stack([values.sum(), torch.full_like(values[0], values.numel())])

    def means(self) -> dict[str, float]:
        """Return the mean of each metric that was added.

        The means are those of all processes if `table` has been summed over them.
        """
        pairs = zip(self.names, self.table.tolist(), strict=True)
        return {name: total / count for name, (total, count) in pairs if count}


def micro_batches(count: int, size: int) -> list[range]:
    """Return the rows of each micro-batch of `count` items."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def accumulate(
    rows: Sequence[range], loss: Callable[[range], Tensor], device: torch.device
) -> None:
    """Add the gradients of the losses of micro-batches to the parameters' `.grad`.

    Args:
        rows: rows of each micro-batch.
        loss: maps the rows of a micro-batch to its share of the loss, a scalar.
        device: device of the denoiser.
    """
    for part in rows:
        value = loss(part)
        # gradient checkpointing recomputes forwards here, which must use the same attention kernel
        with attention(device):
            value.backward()
