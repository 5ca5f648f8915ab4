"""Fill the cache of a run that learns from images, without training."""

from __future__ import annotations

from diffalign.config import AnyRunConfig, LatentRunConfig, PreferenceRunConfig
from diffalign.core import processes
from diffalign.core.errors import UsageError
from diffalign.data.shard_cache import ShardCache
from diffalign.methods.dcgen.maker import precompute_latents
from diffalign.methods.preference.precompute import precompute
from diffalign.training.inputs import check_source
from diffalign.training.run import prepare_model


def fill_cache(config: AnyRunConfig) -> ShardCache:
    """Encode the images of a run into its cache, all processes together.

    Raises:
        UsageError: the algorithm learns from no images.
    """
    if not isinstance(config, PreferenceRunConfig | LatentRunConfig):
        raise UsageError(
            f"precompute: {config.algorithm.type} learns from no pairs and from no latents"
        )
    check_source(config)
    accelerator = processes.make_accelerator()
    model = prepare_model(config, accelerator.device)
    if isinstance(config, LatentRunConfig):
        return precompute_latents(config, model, accelerator)
    return precompute(config, model, accelerator)
