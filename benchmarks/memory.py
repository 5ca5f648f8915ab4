"""Forecast the memory of every recipe for a published model, from its configuration alone.

For each of two cards, the result names the cheapest settings with which the recipe fits, as `model.memory=auto` chooses
them.

The forecast counts the tensors of forwards and backwards on the meta device. No weights are loaded and no GPU is
needed. Tests compare the count with what torch's allocator gives out on a CPU.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common.record import BenchOptions
from diffalign.config import AnyRunConfig, load, recipes
from diffalign.training.forecast import forecast_of
from diffalign.training.memory import GIB, MemoryForecast
from diffalign.training.memory_fit import Room, cheapest, usable
from diffalign.training.memory_settings import spelt

CARDS = (24, 80)
"""Sizes of GPUs in GiB."""
QUICK = ("inversion-dpo-sd1.5",)


def is_published(config: AnyRunConfig) -> bool:
    """Return whether a recipe is for a published model, and not for one of Shapes."""
    return bool(config.model.name) and not config.model.name.startswith("shapes-")


def one_process(config: AnyRunConfig, most: float | None = None) -> MemoryForecast | None:
    """Return the forecast of a run with one process."""
    return forecast_of(config, processes=1, most=most)


def parts_of(forecast: MemoryForecast) -> dict[str, float]:
    """Return a forecast in GiB, in all and by part."""
    sizes = {"total": forecast.total, **forecast.always, **forecast.phases}
    return {part: round(size / GIB, 2) for part, size in sizes.items()}


def forecast_recipe(name: str) -> dict[str, Any] | None:
    """Return the memory forecast of one process, as the recipe is and on each card.

    Return None if the recipe names no model, or its configuration is not on this machine.
    """
    config = load(name)
    forecast = one_process(config)
    if forecast is None:
        return None
    arm: dict[str, Any] = {
        "model": config.model.name,
        "method": config.algorithm.type,
        "micro_batch_size": config.training.micro_batch_size,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        **parts_of(forecast),
    }
    for card in CARDS:
        fit = cheapest(config, usable([Room(f"{card} GiB", card * GIB)]), one_process)
        arm[f"on_{card}_gib"] = (
            None if fit is None else {"settings": spelt(fit.changes), **parts_of(fit.forecast)}
        )
    return arm


def run(options: BenchOptions) -> dict[str, Any]:
    """Forecast all recipes; an arm is a recipe."""
    names = [name for name in recipes() if is_published(load(name))]
    arms = {}
    for name in options.select(QUICK if options.quick else names):
        forecast = forecast_recipe(name)
        if forecast is not None:
            arms[name] = forecast
    return {"headline": {name: arm["total"] for name, arm in arms.items()}, "arms": arms}
