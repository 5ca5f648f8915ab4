"""How long a denoiser's forward takes, before and after it was made smaller."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffalign.precision import attention

REPEATS = 7
WARM_UP = 2


@torch.no_grad()
def latency(model: Any, rows: int, *, height: int | None = None, width: int | None = None) -> float:
    """Median seconds of one forward of a `TextToImageModel`'s denoiser for so many images; sizes in pixels."""
    size = height or model.default_size[0], width or model.default_size[1]
    inputs = model.random_inputs(rows, *size)
    with attention(model.device):
        return statistics.median(interleaved([lambda: model.forward(*inputs)], model.device)[0])


@torch.no_grad()
def interleaved(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int = REPEATS
) -> list[list[float]]:
    """Seconds of several calls, `repeats` of each after some to warm up, turn and turn about: a machine that slows down
    slows all of them."""
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
