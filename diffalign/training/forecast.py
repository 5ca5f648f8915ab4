"""Forecast the memory of a run from configuration files, without weights."""

from __future__ import annotations

import torch

from diffalign.config import AnyRunConfig, to_dict
from diffalign.config.methods import trainer_class
from diffalign.core.errors import UserError
from diffalign.core.fingerprint import of_json
from diffalign.pipelines.registry import load_meta_model
from diffalign.training.memory import MemoryForecast, MetaRun
from diffalign.training.memory_settings import plain

MOST_RUNS = 6
_RUNS: dict[str, MetaRun | None] = {}


def forecast_of(
    config: AnyRunConfig, *, processes: int, most: float | None = None
) -> MemoryForecast | None:
    """Forecast the memory of one of `processes` processes, without loading weights.

    Return None if the model's configuration cannot be read or run. Loading the model then reports the reason.

    Args:
        most: bytes beyond which peaks are not measured, because the run does not fit without them.
    """
    try:
        run = _meta_run(config)
        if run is None:
            return None
        resident = run.resident(config, processes=processes)
        if most is not None and resident.total > most:
            return resident
        return run.forecast(config, processes=processes)
    except (OSError, UserError):
        return None


def _meta_run(config: AnyRunConfig) -> MetaRun | None:
    """Return the run on the meta device.

    Runs that differ in memory settings only share it.

    Return None if the model's configuration cannot be read or quantised.
    """
    shared = plain(config)
    settings = to_dict(shared)
    drawing = settings[config.drawing.group]
    parts = {name: settings.get(name) for name in ("model", "lora", "latents")}
    sizes = [drawing["height"], drawing["width"], settings["training"]["mixed_precision"]]
    key = of_json([config.algorithm.type, parts, sizes])
    if key in _RUNS:
        return _RUNS[key]
    while len(_RUNS) >= MOST_RUNS:
        del _RUNS[next(iter(_RUNS))]
    _RUNS[key] = None
    c = config.model
    model = load_meta_model(
        c.name,
        dtype=getattr(torch, c.dtype),
        revision=c.revision,
        max_sequence_length=c.max_sequence_length,
    )
    model = trainer_class(config.algorithm.type).trained_model(config, model)
    _RUNS[key] = MetaRun(model, shared)
    return _RUNS[key]
