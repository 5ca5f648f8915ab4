"""Time a denoiser's forward before and after quantisation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.core.precision import attention

REPEATS = 7
WARM_UP = 2


@dataclass(frozen=True)
class Comparison:
    """Medians over forwards in milliseconds, and their ratio."""

    ms: float
    plain_ms: float
    ratio: float

    @classmethod
    def of(cls, seconds: Sequence[float], plain: Sequence[float]) -> Comparison:
        """Compare the seconds of a model's forwards with those of the plain model."""
        own, base = statistics.median(seconds), statistics.median(plain)
        return cls(1000 * own, 1000 * base, own / base)


@torch.no_grad()
def forward_seconds(
    model: Any, rows: int, size: tuple[int | None, int | None] | None = None
) -> list[float]:
    """Time forwards of a `TextToImageModel`'s denoiser for so many images.

    They are in its own dtype and eager (not compiled). The size is (height, width) in pixels; None is the model's own.
    """
    inputs = model.random_inputs(rows, model.image_size(size))
    with attention(model.device):
        return interleaved([lambda: model.forward(*inputs)], model.device)[0]


def interleaved(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int = REPEATS
) -> list[list[float]]:
    """Time the calls interleaved, so that a slowing machine affects all of them equally.

    Return the seconds of `repeats` calls each, after warm-up calls. The caller decides whether gradients are recorded.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + WARM_UP):
        for times, call in zip(seconds, calls, strict=True):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= WARM_UP:
                times.append(time.perf_counter() - started)
    return seconds
