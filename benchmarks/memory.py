"""Forecast the memory of every recipe for a published model, from its configuration alone.

For a recipe that needs more than a common card has, the result also names settings with which it fits.

The forecast counts the bytes of weights, adapters, optimizer and saved activations on the meta device. No weights are
loaded and no GPU is needed; tests compare the count with real steps of tiny models.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common.record import BenchOptions
from diffalign.config import AnyRunConfig, load, recipes
from diffalign.training.forecast import forecast_of
from diffalign.training.memory import GIB
from diffalign.training.memory_fit import INT4_SHARE, fits

CARDS = (24, 80)
"""Sizes of GPUs in GiB."""
RESERVE = 2
"""GiB of the smallest GPU that stay free for the CUDA context and a reward."""
QUICK = ("inversion-dpo-sd1.5",)


def is_published(config: AnyRunConfig) -> bool:
    """Return whether a recipe is for a published model, and not for one of Shapes."""
    return bool(config.model.name) and not config.model.name.startswith("shapes-")


def forecast_recipe(name: str) -> dict[str, Any] | None:
    """Return the memory forecast of one process in GiB, in all and by part.

    Return None if the recipe names no model.
    """
    config = load(name)
    forecast = forecast_of(config, processes=1)
    if forecast is None:
        return None
    smallest = min(CARDS)
    free = (smallest - RESERVE) * GIB
    settings, size = "", forecast.total
    if forecast.total > free:
        lighter = fits(config, free, lambda c: forecast_of(c, processes=1))
        settings, size = lighter[0] if lighter else ("", 0)
    int4 = forecast.total - round(forecast.denoiser * (1 - INT4_SHARE))
    parts = ("denoiser", "text_encoders", "autoencoder", "adapters", "optimizer", "rollout")
    sizes = {part: getattr(forecast, part) for part in (*parts, "activations")}
    return {
        "model": config.model.name,
        "micro_batch_size": config.training.micro_batch_size,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "total": round(forecast.total / GIB, 2),
        **{part: round(size / GIB, 2) for part, size in sizes.items()},
        "fits": [card for card in CARDS if forecast.total <= card * GIB],
        f"on_{smallest}_gib": {"settings": settings, "total": round(size / GIB, 2)}
        if size
        else None,
        "int4_base": round(int4 / GIB, 2),
    }


def run(options: BenchOptions) -> dict[str, Any]:
    """Forecast all recipes; an arm is a recipe."""
    names = [name for name in recipes() if is_published(load(name))]
    arms = {}
    for name in options.select(QUICK if options.quick else names):
        forecast = forecast_recipe(name)
        if forecast is not None:
            arms[name] = forecast
    return {"headline": {name: arm["total"] for name, arm in arms.items()}, "arms": arms}
