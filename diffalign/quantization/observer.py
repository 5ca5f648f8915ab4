"""Scales for the inputs of layers, calibrated while a model samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.quantization.integer import timestep_of

SAMPLE_SIZE = 4096
"""Random numbers of a layer's input that are stored per forward, besides the largest one."""
P = 2.4
"""Exponent p of the error sum |x - Q(x)|^p that scales minimise (PTQ4DM)."""
RATIOS = torch.linspace(0.2, 1.0, 41)
"""Candidate clipping points as ratios to the largest input."""


@dataclass(frozen=True)
class ActivationScales:
    """Scales (timesteps,) by layer, and the timesteps in the denoiser's own units, noise first."""

    timesteps: tuple[float, ...]
    scales: dict[str, Tensor]


class InputObserver:
    """Recorder of layers' inputs in a denoiser.

    If `rows` is set, only these batch rows of the next forward are recorded.

    Args:
        model: the denoiser.
        names: names of the layers.
        by_timestep: whether each timestep gets its own scales; otherwise all share one.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, by_timestep: bool) -> None:
        self.model, self.names, self.by_timestep = model, list(names), by_timestep
        self.rows: Tensor | None = None
        self.timestep = 0.0
        self._values: dict[tuple[str, float], list[Tensor]] = {}
        self._generator = torch.Generator().manual_seed(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record inputs inside the context. The hooks are removed at its end, also after an error."""
        layers = {name: self.model.get_submodule(name) for name in self.names}
        handles = [self.model.register_forward_pre_hook(self._read_timestep, with_kwargs=True)]
        handles += [
            layer.register_forward_pre_hook(lambda _, args, name=name: self._record(name, args[0]))
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scales(self) -> ActivationScales:
        """Return the scales for everything recorded.

        Raises:
            ValueError: nothing was recorded.
        """
        timesteps = sorted({t for _, t in self._values}, reverse=True)
        if not timesteps:
            raise ValueError(
                "No layer was reached: nothing was sampled while inputs were recorded."
            )
        scales: dict[str, Tensor] = {}
        for name in self.names:
            parts = [self._values.get((name, t)) for t in timesteps]
            best = [best_scale(torch.cat(p)) if p else 0.0 for p in parts]
            scales[name] = torch.tensor(best)
        return ActivationScales(tuple(timesteps), scales)

    def _read_timestep(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.timestep = timestep_of(model, args, kwargs)

    def _record(self, name: str, value: Tensor) -> None:
        if self.rows is not None:
            if not len(self.rows):
                return
            value = value[self.rows.to(value.device)]
        numbers = value.detach().float().flatten()
        indices = torch.randint(numbers.numel(), (SAMPLE_SIZE,), generator=self._generator)
        sampled = numbers[indices.to(numbers.device)].cpu()
        largest = numbers[numbers.abs().argmax()].cpu()
        key = name, self.timestep if self.by_timestep else 0.0
        self._values.setdefault(key, []).append(torch.cat([sampled, largest[None]]))


def best_scale(values: Tensor, *, bits: int = 8, p: float = P) -> float:
    """Return the scale of symmetric codes that fits values (N,) best.

    It has the least sum of |x - Q(x)|^p. Return 0 if all values are zero.
    """
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
