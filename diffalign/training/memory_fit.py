"""Say whether a run fits into the free memory, and with which settings it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from diffalign.config import AnyRunConfig
from diffalign.training.memory import GIB, MemoryForecast
from diffalign.training.memory_settings import (
    SMALLER_BATCHES,
    Changes,
    Lever,
    changed,
    combinations,
    micro_batches,
    spelt,
)

CGROUP = Path("/sys/fs/cgroup")
SPARE = 0.1
"""Share of the free memory that stays free: for the allocator's rounding, kernels' buffers and small rewards."""
Forecast = Callable[[AnyRunConfig, float | None], MemoryForecast | None]
"""Function (configuration, most) -> forecast, or None if the model's configuration is not available.

Beyond `most` bytes a forecast may leave out the peaks.
"""


@dataclass(frozen=True)
class Room:
    """Free memory for one process: the device's name, and the number of bytes."""

    where: str
    free: int


def free_memory(*, processes: int = 1) -> list[Room]:
    """Return the free memory of every GPU.

    Without a GPU, return one process's share of the free RAM, which a limit of the container may reduce.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count)]
        return [Room(names[i], torch.cuda.mem_get_info(i)[0]) for i in range(count)]
    free = psutil.virtual_memory().available
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return [Room("RAM", free // processes)]


def _number(file: Path) -> int | None:
    """Return the number in a cgroup file, or None without a file or a limit."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Fit:
    """Combination of memory settings with which a run fits, and its forecast."""

    changes: Changes
    forecast: MemoryForecast

    def __str__(self) -> str:
        return f"{spelt(self.changes)}: {self.forecast.total / GIB:.2f} GiB"


def usable(rooms: Sequence[Room]) -> float:
    """Return the bytes that a run may take, on the fullest device."""
    return (1 - SPARE) * min(room.free for room in rooms)


def cheapest(config: AnyRunConfig, free: float, forecast: Forecast) -> Fit | None:
    """Return the cheapest combination of memory settings whose forecast fits, or None.

    Costs are those of `memory_settings`. A combination with smaller micro-batches costs more than the same with those
    of the run.

    Args:
        free: bytes that the run may take.
        forecast: returns the forecast of a run.
    """
    whole = [(lever.cost, lever, False) for lever in combinations(config)]
    smaller = [(cost + SMALLER_BATCHES, lever, True) for cost, lever, _ in whole]
    for _, lever, reduce in sorted((*whole, *smaller), key=lambda entry: entry[0]):
        fit = _fit(config, lever, free, forecast, reduce=reduce)
        if fit is not None:
            return fit
    return None


def _fit(
    config: AnyRunConfig, lever: Lever, free: float, forecast: Forecast, *, reduce: bool
) -> Fit | None:
    """Return a combination with its forecast, or None if it does not fit.

    Args:
        reduce: choose smaller micro-batches.
    """
    changes = dict(lever.changes)
    if reduce:
        sizes = _smaller(changed(config, changes), free, forecast)
        if not sizes:
            return None
        changes |= sizes
    estimate = forecast(changed(config, changes), free)
    return Fit(changes, estimate) if estimate is not None and estimate.total <= free else None


def _smaller(config: AnyRunConfig, free: float, forecast: Forecast) -> Changes:
    """Return micro-batches that fit, powers of two, where those of the run do not.

    Peaks grow by as much with each image, so that those of one and of two images give all others.
    """
    paths = micro_batches(config)
    one, two = (forecast(changed(config, dict.fromkeys(paths, n)), free) for n in (1, 2))
    if one is None or two is None or one.total > free:
        return {}
    room = free - sum(one.always.values())
    sizes: Changes = {}
    for path, size in paths.items():
        phase = _phase(config, path)
        least, each = one.phases[phase], two.phases[phase] - one.phases[phase]
        images = 1 + max(0, int((room - least) // max(each, 1)))
        if images < size:
            sizes[path] = 1 << (images.bit_length() - 1)
    return sizes


def _phase(config: AnyRunConfig, path: str) -> str:
    """Return the phase of a run that a micro-batch belongs to."""
    group = path.partition(".")[0]
    return {"training": "training", config.drawing.group: "drawing"}.get(group, "encoding")


def describe(config: AnyRunConfig, rooms: Sequence[Room], forecast: Forecast) -> list[str]:
    """Return lines that compare the forecast with the free memory.

    If the run does not fit, a table has the forecasts of combinations of memory settings, up to the cheapest that fits.

    Args:
        rooms: free memory, from `free_memory`.
        forecast: returns the forecast of a run.
    """
    estimate = forecast(config, None)
    if estimate is None:
        return [
            f"no memory forecast: the configuration of {config.model.name} is neither here nor reachable"
        ]
    free = usable(rooms)
    names = ", ".join(f"{room.free / GIB:.2f} on {room.where}" for room in rooms)
    lines = [
        str(estimate),
        f"free memory, GiB: {names}; a run may take {100 * (1 - SPARE):.0f} % of it",
    ]
    if estimate.total <= free:
        return [*lines, "the run fits"]
    fit = cheapest(config, free, forecast)
    lines += table([Fit({}, estimate), *_steps(config, fit, forecast)])
    if fit is None:
        return [*lines, "the run does not fit with any of these settings"]
    actor = "model.memory=auto sets" if config.model.memory is None else "the run sets"
    return [*lines, f"the run does not fit as it is; {actor} {spelt(fit.changes)}"]


def _steps(config: AnyRunConfig, fit: Fit | None, forecast: Forecast) -> list[Fit]:
    """Return the way to a combination, or to the least memory, setting by setting."""
    changes = fit.changes if fit is not None else _least(config, forecast)
    steps, sofar = [], {}
    for name, value in changes.items():
        sofar[name] = value
        estimate = forecast(changed(config, sofar), None)
        if estimate is not None:
            steps.append(Fit(dict(sofar), estimate))
    return steps


def _least(config: AnyRunConfig, forecast: Forecast) -> Changes:
    """Return the most costly settings that have a forecast."""
    # a small denoiser has nothing to quantise
    smallest = dict.fromkeys(micro_batches(config), 1)
    for lever in reversed(combinations(config)):
        if forecast(changed(config, lever.changes), 0) is not None:
            return lever.changes | smallest
    return {**smallest}


def table(fits: Sequence[Fit]) -> list[str]:
    """Return forecasts by part as lines, in GiB.

    A line's settings are added to those above it.
    """
    columns = ("total", "denoiser", "encoders", "trained", "training", "drawing", "encoding")
    lines = [f"{'GiB':>10}{''.join(f'{name:>10}' for name in columns[1:])}  settings"]
    before: Changes = {}
    for fit in fits:
        f = fit.forecast
        visitors = 0 if f.encoders_rest else f.text_encoders + f.autoencoder
        trained = f.adapters + f.optimizer
        numbers = (f.total, f.denoiser, visitors, trained, *f.phases.values())
        new = {k: v for k, v in fit.changes.items() if before.get(k) != v}
        prefix = "+ " if before else ""
        shown = "".join(f"{n / GIB:>10.2f}" for n in numbers)
        lines.append(f"{shown}  {prefix}{spelt(new)}")
        before = fit.changes
    return lines


def summary(config: AnyRunConfig, rooms: Sequence[Room], forecast: Forecast) -> str | None:
    """Return the comparison of `describe` in one line, or None if there is no forecast."""
    estimate = forecast(config, None)
    if estimate is None:
        return None
    room = min(rooms, key=lambda r: r.free)
    total, free = f"{estimate.total / GIB:.2f}", f"{room.free / GIB:.2f}"
    text = f"memory forecast, GiB for a process: {total}; {free} free on {room.where}"
    if estimate.total <= usable(rooms):
        return text
    return f"{text}: it may not fit. A dry run shows settings with which it does, and model.memory=auto sets them"
