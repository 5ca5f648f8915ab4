"""Update of one module by a LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """The update of one module: `alpha / rank * up @ down`, in float32.

    `down` (r, in) and `up` (out, r); those of convolutions have a kernel behind. `magnitude` (out,) is PEFT's of DoRA:
    the length of each row of the weight after the update.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, shape: torch.Size) -> Tensor:
        """Return the update of a weight of this shape, magnitude aside."""
        return (self.scale * self.up.flatten(1) @ self.down.flatten(1)).reshape(shape)
