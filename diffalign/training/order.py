"""Choose the rows of a data set that an update trains on.

Every row is trained on once per epoch, in a random order of that epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffalign.core.seeds import PAIRS, stream


class EpochOrder:
    """Order in which updates read the rows of a data set.

    The rows of an update depend on the seed and the number of the update alone.

    Args:
        rows: indices of the rows, at least one.
        size: number of rows per update.
    """

    def __init__(self, rows: Sequence[int], *, size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, size, seed
        self._order: tuple[int, torch.Tensor] | None = None

    def __call__(self, number: int) -> list[int]:
        """Return the rows of update `number`, counted from 1."""
        start = (number - 1) * self.size
        return [self._at(i) for i in range(start, start + self.size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(stream(PAIRS, self.seed, epoch))
            self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return self.rows[int(self._order[1][place])]
