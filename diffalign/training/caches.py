"""Fill the cache of a run that learns from pairs or images, without training."""

from __future__ import annotations

from diffalign.config import AnyRunConfig
from diffalign.config.methods import cache_filler
from diffalign.core import processes
from diffalign.core.errors import UsageError
from diffalign.data.shard_cache import ShardCache
from diffalign.training.denoise import prepare_model
from diffalign.training.inputs import check_source


def fill_cache(config: AnyRunConfig) -> ShardCache:
    """Encode the images of a run into its cache; all processes share the work.

    Raises:
        UsageError: runs of this algorithm have no cache.
    """
    filler = cache_filler(config.algorithm.type)
    if filler is None:
        raise UsageError(
            f"precompute: recipes of type {config.algorithm.type} have no cache to fill. "
            "Use a recipe with pairs or latents."
        )
    check_source(config)
    accelerator = processes.make_accelerator()
    model = prepare_model(config, accelerator.device)
    cache: ShardCache = filler(config, model, accelerator)
    return cache
