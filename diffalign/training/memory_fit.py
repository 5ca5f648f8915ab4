"""Whether a run fits into the memory that is free, and with which settings it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from diffalign.config import AnyRunConfig
from diffalign.training.memory import GIB, MemoryForecast

CGROUP = Path("/sys/fs/cgroup")
INT4_SHARE = 4.5 / 16
"""Part of a bfloat16 denoiser that is left in 4 bits with scales, about."""
Forecast = Callable[[AnyRunConfig], MemoryForecast | None]


@dataclass(frozen=True)
class Room:
    """Memory that is free for one process, in bytes, and where it is."""

    where: str
    free: int


def free_memory(*, processes: int = 1) -> list[Room]:
    """Return the free memory of every GPU, or this process's share of the RAM where there is none."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count)]
        return [Room(names[i], torch.cuda.mem_get_info(i)[0]) for i in range(count)]
    free = psutil.virtual_memory().available
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return [Room("RAM", free // processes)]


def _number(file: Path) -> int | None:
    """Return the number in a file of the kernel's; None where there is no file or no limit."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def describe(config: AnyRunConfig, rooms: Sequence[Room], forecast: Forecast) -> list[str]:
    """Return lines: the forecast, the free memory, and what would make the run fit where it does not.

    Args:
        rooms: of `free_memory`.
        forecast: counts a configuration; None where the model's configuration is not to be had.
    """
    found = forecast(config)
    if found is None:
        return [
            f"no memory forecast: the configuration of {config.model.name} is neither here nor reachable"
        ]
    smallest = min(room.free for room in rooms)
    free = ", ".join(f"{room.free / GIB:.2f} on {room.where}" for room in rooms)
    lines = [str(found), f"free memory, GiB: {free}"]
    if found.total <= smallest:
        return [*lines, "the run fits"]
    fitting = fits(config, smallest, forecast)
    if fitting:
        lines.append("the run does not fit; it does with any of:")
        return lines + [f"  {settings}: {size / GIB:.2f} GiB" for settings, size in fitting]
    least, size = _least(config, forecast)
    small = size - found.denoiser * (1 - INT4_SHARE)
    return [
        *lines,
        f"the run does not fit with any setting; least is {size / GIB:.2f} GiB with {least}",
        f"  with a base of `diffalign quantize --backend int4` as model.name about {small / GIB:.2f} GiB",
    ]


def summary(config: AnyRunConfig, rooms: Sequence[Room], forecast: Forecast) -> str | None:
    """Return the short form, one line; None where there is no forecast."""
    found = forecast(config)
    if found is None:
        return None
    room = min(rooms, key=lambda r: r.free)
    total, free = f"{found.total / GIB:.2f}", f"{room.free / GIB:.2f}"
    text = f"memory forecast, GiB for a process: {total}; {free} free on {room.where}"
    if found.total <= room.free:
        return text
    fitting = fits(config, room.free, forecast)
    advice = fitting[0][0] if fitting else "a smaller or quantised base"
    return f"{text}: it may not fit; `--dry-run` shows more. What helps: {advice}"


def fits(config: AnyRunConfig, free: int, forecast: Forecast) -> list[tuple[str, int]]:
    """Return settings with which the run takes at most `free` bytes, and what it then takes; fewest changes first."""
    found: list[tuple[str, int]] = []
    for change in _changes(config):
        names, changed = dict(change), _with(config, change)
        count = forecast(changed)
        if count is None:
            continue
        if count.total > free and config.training.micro_batch_size > 1:
            names["training.micro_batch_size"] = _micro_batch(changed, free, forecast)
            count = forecast(_with(config, names))
        if count is not None and count.total <= free:
            found.append((_spelt(names), count.total))
    return found


def _changes(config: AnyRunConfig) -> list[dict[str, object]]:
    """Return sets of settings that take less memory, each a little slower than the one before it."""
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
    """Return the largest power of two that fits, by what one image takes; 1 where none does."""
    one = forecast(_with(config, {"training.micro_batch_size": 1}))
    two = forecast(_with(config, {"training.micro_batch_size": 2}))
    if one is None or two is None or one.total > free:
        return 1
    each = max(two.activations - one.activations, 1)
    room = free - (one.total - max(one.activations, one.merged_weights)) - one.activations
    images = 1 + max(0, room) // each
    return min(1 << (int(images).bit_length() - 1), config.training.micro_batch_size)


def _least(config: AnyRunConfig, forecast: Forecast) -> tuple[str, int]:
    """Return the settings that take the least memory, and how much."""
    names = {**_changes(config)[-1], "training.micro_batch_size": 1}
    found = forecast(_with(config, names))
    assert found is not None
    return _spelt(names), found.total


def _with(config: AnyRunConfig, names: dict[str, object]) -> AnyRunConfig:
    """Return a copy with other settings."""
    changed = copy.deepcopy(config)
    for name, value in names.items():
        group, _, field = name.partition(".")
        setattr(getattr(changed, group), field, value)
    return changed


def _spelt(names: dict[str, object]) -> str:
    """Return settings as a user types them."""
    return " ".join(f"{k}={str(v).lower()}" for k, v in names.items())
