"""Say whether a run fits into the free memory, and with which settings it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from diffalign.config import AnyRunConfig, to_dict
from diffalign.core.fingerprint import of_json
from diffalign.training.memory import GIB, MemoryForecast

CGROUP = Path("/sys/fs/cgroup")
INT4_SHARE = 4.5 / 16
"""Approximate ratio of a 4-bit denoiser's size, with scales, to its size in bfloat16."""
Forecast = Callable[[AnyRunConfig], MemoryForecast | None]


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


def _memoized(forecast: Forecast) -> Forecast:
    """Return `forecast`, called once per configuration: a forecast runs the model on the meta device."""
    results: dict[str, MemoryForecast | None] = {}

    def lookup(config: AnyRunConfig) -> MemoryForecast | None:
        key = of_json(to_dict(config))
        if key not in results:
            results[key] = forecast(config)
        return results[key]

    return lookup


def describe(config: AnyRunConfig, rooms: Sequence[Room], forecast: Forecast) -> list[str]:
    """Return lines that compare the forecast with the free memory.

    If the run does not fit, the lines name settings with which it does.

    Args:
        rooms: free memory, from `free_memory`.
        forecast: returns the forecast of a run, or None if the model's configuration is not available.
    """
    forecast = _memoized(forecast)
    estimate = forecast(config)
    if estimate is None:
        return [
            f"no memory forecast: the configuration of {config.model.name} is neither here nor reachable"
        ]
    smallest = min(room.free for room in rooms)
    free = ", ".join(f"{room.free / GIB:.2f} on {room.where}" for room in rooms)
    lines = [str(estimate), f"free memory, GiB: {free}"]
    if estimate.total <= smallest:
        return [*lines, "the run fits"]
    fitting = fits(config, smallest, forecast)
    if fitting:
        which = "any of" if len(fitting) > 1 else "this setting"
        lines.append(f"the run does not fit; it does with {which}:")
        return lines + [f"  {settings}: {size / GIB:.2f} GiB" for settings, size in fitting]
    least, size = _least(config, forecast)
    small = size - estimate.denoiser * (1 - INT4_SHARE)
    return [
        *lines,
        f"the run does not fit with any setting; least is {size / GIB:.2f} GiB with {least}",
        f"  with an int4 base of `diffalign quantize` as model.name about {small / GIB:.2f} GiB",
    ]


def summary(config: AnyRunConfig, rooms: Sequence[Room], forecast: Forecast) -> str | None:
    """Return the comparison of `describe` in one line, or None if there is no forecast."""
    forecast = _memoized(forecast)
    estimate = forecast(config)
    if estimate is None:
        return None
    room = min(rooms, key=lambda r: r.free)
    total, free = f"{estimate.total / GIB:.2f}", f"{room.free / GIB:.2f}"
    text = f"memory forecast, GiB for a process: {total}; {free} free on {room.where}"
    if estimate.total <= room.free:
        return text
    fitting = fits(config, room.free, forecast)
    advice = fitting[0][0] if fitting else "a smaller or quantised base"
    return f"{text}: it may not fit; a dry run shows more. What helps: {advice}"


def fits(config: AnyRunConfig, free: int, forecast: Forecast) -> list[tuple[str, int]]:
    """Return settings with which the run fits into `free` bytes, fewest changes first.

    Each entry has the settings as a text, and the bytes that the run then needs.
    """
    fitting: list[tuple[str, int]] = []
    for change in _changes(config):
        names, changed = dict(change), _with(config, change)
        count = forecast(changed)
        if count is None:
            continue
        if count.total > free and config.training.micro_batch_size > 1:
            names["training.micro_batch_size"] = _micro_batch(changed, free, forecast)
            count = forecast(_with(config, names))
        if count is not None and count.total <= free:
            fitting.append((_spelt(names), count.total))
    return fitting


def _changes(config: AnyRunConfig) -> list[dict[str, object]]:
    """Return sets of settings that need less memory, the fastest first."""
    group = config.drawing.group
    single: list[dict[str, object]] = []
    if config.drawing.merge_lora:
        single.append({f"{group}.merge_lora": False})
    if config.model.dtype == "float32":
        single.append({"model.dtype": "bfloat16"})
    if not config.model.gradient_checkpointing:
        single.append({"model.gradient_checkpointing": True})
    everything = {k: v for change in single for k, v in change.items()}
    sets: list[dict[str, object]] = [{}, *single]
    return sets if everything in sets else [*sets, everything]


def _micro_batch(config: AnyRunConfig, free: int, forecast: Forecast) -> int:
    """Return the largest micro-batch that fits, a power of two, or 1 if none fits.

    The memory of one image is extrapolated from the forecasts of one and of two images.
    """
    one = forecast(_with(config, {"training.micro_batch_size": 1}))
    two = forecast(_with(config, {"training.micro_batch_size": 2}))
    if one is None or two is None or one.total > free:
        return 1
    each = max(two.activations - one.activations, 1)
    room = free - (one.total - max(one.activations, one.merged_weights)) - one.activations
    images = 1 + max(0, room) // each
    return min(1 << (int(images).bit_length() - 1), config.training.micro_batch_size)


def _least(config: AnyRunConfig, forecast: Forecast) -> tuple[str, int]:
    """Return the settings that need the least memory, and the bytes that they need."""
    names = {**_changes(config)[-1], "training.micro_batch_size": 1}
    estimate = forecast(_with(config, names))
    assert estimate is not None
    return _spelt(names), estimate.total


def _with(config: AnyRunConfig, names: dict[str, object]) -> AnyRunConfig:
    """Return a copy of a configuration with some settings changed, named "group.setting"."""
    changed = copy.deepcopy(config)
    for name, value in names.items():
        group, _, field = name.partition(".")
        setattr(getattr(changed, group), field, value)
    return changed


def _spelt(names: dict[str, object]) -> str:
    """Return settings as a user types them on the command line."""
    return " ".join(f"{k}={str(v).lower()}" for k, v in names.items())
