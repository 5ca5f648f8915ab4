"""Forecast the memory of a run from configuration files, without weights."""

from __future__ import annotations

import torch

from diffalign.config import AnyRunConfig, LatentRunConfig
from diffalign.core.errors import UserError
from diffalign.pipelines.moving import load_autoencoder, move_model
from diffalign.pipelines.registry import load_meta_model
from diffalign.training.denoise import image_size
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
        if isinstance(config, LatentRunConfig) and config.latents.autoencoder is not None:
            vae = load_autoencoder(config.latents.autoencoder, dtype=dtype, meta=True)
            size = image_size(config, model)
            model = move_model(model, vae, size=size, channels=config.latents.channels)
        return forecast(model, config, processes=processes)
    except (OSError, UserError):
        return None
