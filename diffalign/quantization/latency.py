"""How long a denoiser's forward takes, before and after it was made smaller."""

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
    """Medians over forwards in milliseconds, and of the paired ratios."""

    ms: float
    plain_ms: float
    ratio: float


@torch.no_grad()
def compare(
    model: Any, plain: Any, rows: int, *, height: int | None = None, width: int | None = None
) -> Comparison:
    """Forwards of the denoisers of two `TextToImageModel`s for so many images, turn and turn about, each in its own
    dtype and eager (not compiled); sizes in pixels."""
    size = height or model.default_size[0], width or model.default_size[1]
    inputs = [m.random_inputs(rows, *size) for m in (model, plain)]
    calls = [lambda m=m, i=i: m.forward(*i) for m, i in zip((model, plain), inputs, strict=True)]
    with attention(model.device):
        times, base = interleaved(calls, model.device)
    ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
    return Comparison(1000 * statistics.median(times), 1000 * statistics.median(base), ratio)


def interleaved(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int = REPEATS
) -> list[list[float]]:
    """Seconds of several calls, `repeats` of each after some to warm up, turn and turn about: a machine that slows down
    slows all of them. Whether gradients are kept is the caller's to say."""
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + WARM_UP):
        for times, call in zip(found, calls, strict=True):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= WARM_UP:
                times.append(time.perf_counter() - started)
    return found
