"""Scales for the inputs of layers, from what comes in while a model draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.quantization.integer import timestep_of

KEPT = 4096
"""Numbers of a layer's input that are kept of each forward, and its largest."""
P = 2.4
"""Of the error that scales make smallest, sum |x - Q(x)|^p. (PTQ4DM)"""
RATIOS = torch.linspace(0.2, 1.0, 41)
"""Of the largest input: what lies beyond is clipped."""


@dataclass(frozen=True)
class ActivationScales:
    """Scales (timesteps,) by layer, and the timesteps in the denoiser's own units, noise first."""

    timesteps: tuple[float, ...]
    scales: dict[str, Tensor]


class InputObserver:
    """Watches layers of a denoiser; `rows`, where it is set, are those of the batch that count in the next forward.

    Args:
        by_timestep: scales for each timestep that comes; otherwise one for all of them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, by_timestep: bool) -> None:
        self.model, self.names, self.by_timestep = model, list(names), by_timestep
        self.rows: Tensor | None = None
        self.timestep = 0.0
        self._found: dict[tuple[str, float], list[Tensor]] = {}
        self._generator = torch.Generator().manual_seed(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are gone afterwards, whatever happens."""
        layers = {name: self.model.get_submodule(name) for name in self.names}
        handles = [self.model.register_forward_pre_hook(self._at, with_kwargs=True)]
        handles += [
            layer.register_forward_pre_hook(lambda _, args, name=name: self._keep(name, args[0]))
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scales(self) -> ActivationScales:
        """Of everything seen."""
        timesteps = sorted({t for _, t in self._found}, reverse=True)
        if not timesteps:
            raise ValueError("no layer was reached: nothing was drawn while it was watched")
        scales: dict[str, Tensor] = {}
        for name in self.names:
            parts = [self._found.get((name, t)) for t in timesteps]
            found = [best_scale(torch.cat(p)) if p else 0.0 for p in parts]
            scales[name] = torch.tensor(found)
        return ActivationScales(tuple(timesteps), scales)

    def _at(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.timestep = timestep_of(model, args, kwargs)

    def _keep(self, name: str, value: Tensor) -> None:
        if self.rows is not None:
            if not len(self.rows):
                return
            value = value[self.rows.to(value.device)]
        numbers = value.detach().float().flatten()
        chosen = torch.randint(numbers.numel(), (KEPT,), generator=self._generator)
        kept = numbers[chosen.to(numbers.device)].cpu()
        largest = numbers[numbers.abs().argmax()].cpu()
        key = name, self.timestep if self.by_timestep else 0.0
        self._found.setdefault(key, []).append(torch.cat([kept, largest[None]]))


def best_scale(values: Tensor, *, bits: int = 8, p: float = P) -> float:
    """Of symmetric codes for values (N,), with the least sum of |x - Q(x)|^p; 0 where all are zero."""
    top = 2 ** (bits - 1) - 1
    largest = float(values.abs().max())
    scales = (RATIOS * largest / top).bfloat16().float()
    if not float(scales[0]) > 0:
        return 0.0
    errors = [
        float(((values / s).round().clamp(-top - 1, top) * s - values).abs().pow(p).sum())
        for s in scales
    ]
    return float(scales[errors.index(min(errors))])
