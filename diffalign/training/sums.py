"""Sums of metrics over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
