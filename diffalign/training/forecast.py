"""Forecast the memory of a run from configuration files, without weights."""

from __future__ import annotations

import torch

from diffalign.config import AnyRunConfig
from diffalign.config.methods import trainer_class
from diffalign.core.errors import UserError
from diffalign.pipelines.registry import load_meta_model
from diffalign.training.memory import MemoryForecast, forecast


def forecast_of(config: AnyRunConfig, *, processes: int) -> MemoryForecast | None:
    """Forecast the memory of one of `processes` processes, without loading weights.

    Return None if the model's configuration cannot be read or run. Loading the model then reports the reason.
    """
    c = config.model
    dtype = getattr(torch, c.dtype)
    try:
        model = load_meta_model(
            c.name, dtype=dtype, revision=c.revision, max_sequence_length=c.max_sequence_length
        )
        model = trainer_class(config.algorithm.type).trained_model(config, model)
        return forecast(model, config, processes=processes)
    except (OSError, UserError):
        return None
