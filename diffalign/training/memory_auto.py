"""Choose the memory settings of a run with `model.memory=auto`."""

from __future__ import annotations

import logging

from diffalign.config import AnyRunConfig, ConfigError, decode, to_dict
from diffalign.core import console, processes
from diffalign.training.forecast import forecast_of
from diffalign.training.memory import GIB, MemoryForecast
from diffalign.training.memory_fit import cheapest, free_memory, usable
from diffalign.training.memory_settings import Changes, adopted, changed, spelt
from diffalign.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def kept_settings(config: AnyRunConfig) -> AnyRunConfig:
    """Return a run's configuration with the memory settings that an earlier sitting chose.

    Other runs, and the first sitting, get their configuration as it is.
    """
    earlier = RunFolder(config.output_dir).chosen_memory(config)
    return config if earlier is None else adopted(config, earlier)


def settled(config: AnyRunConfig) -> AnyRunConfig:
    """Return a run's configuration with memory settings that fit, if it asks for them.

    The choice is printed. An earlier sitting's choice is kept.

    Raises:
        ConfigError: no combination of settings fits.
    """
    if config.model.memory is None:
        return config
    earlier = RunFolder(config.output_dir).chosen_memory(config)
    if earlier is not None:
        return adopted(config, earlier)
    # one process chooses, because each would see other free memory
    changes = processes.on_main(lambda: _choice(config))
    result: AnyRunConfig = decode(to_dict(changed(config, changes)))
    return result


def _choice(config: AnyRunConfig) -> Changes:
    """Return the settings that the run is changed by, and print them."""
    count = processes.current().num_processes
    free = usable(free_memory(processes=count))

    def forecast(candidate: AnyRunConfig, most: float | None) -> MemoryForecast | None:
        return forecast_of(candidate, processes=count, most=most)

    if forecast(config, 0) is None:
        logger.warning(
            "model.memory=auto: the configuration of %s is neither here nor reachable, and no setting is changed",
            config.model.name,
        )
        return {}
    fit = cheapest(config, free, forecast)
    if fit is None:
        raise ConfigError(
            f"no combination of memory settings fits into {free / GIB:.2f} GiB; a dry run shows what they need. Use "
            "a card with more memory or a smaller model",
            setting="model.memory",
            value="auto",
        )
    total = fit.forecast.total / GIB
    console.say(f"model.memory=auto: {spelt(fit.changes)}, {total:.2f} of {free / GIB:.2f} GiB")
    return fit.changes
