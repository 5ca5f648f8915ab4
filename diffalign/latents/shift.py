"""Shift of a moved model's noise levels, stored in its scheduler's configuration.

Training, evaluation and the pipeline all read it there, so that they cannot differ.
"""

from __future__ import annotations

import math
from typing import Any

from diffalign.core.errors import UsageError

TOKENS = ("base_image_seq_len", "max_image_seq_len")
MU = ("base_shift", "max_shift")
STATIC = ("flow_shift", "shift")


def moved_scheduler(scheduler: Any, *, ratio: int, signal: float = 1.0) -> Any:
    """Return a stock scheduler for the same images in a new latent space.

    An image is sampled at the base model's noise levels for its size in pixels, with an additional shift by `signal`.

    Args:
        scheduler: scheduler of the base model.
        ratio: old tokens per side that one new token replaces.
        signal: r of the additional shift s' = r s / (1 + (r - 1) s); 1 changes nothing.

    Raises:
        UsageError: the scheduler has no shift to set.
    """
    config = scheduler.config
    changes: dict[str, Any] = {}
    if config.get("use_dynamic_shifting"):
        linear = config.get("time_shift_type") == "linear"
        for name in TOKENS:
            changes[name] = _whole(config[name] / ratio**2)
        for name in MU:
            changes[name] = config[name] * signal if linear else config[name] + math.log(signal)
    elif signal != 1:
        key = next((k for k in STATIC if config.get(k) is not None), None)
        if key is None:
            raise UsageError(
                f"latents.shift: {type(scheduler).__name__} has no shift. Use latents.shift=pixels."
            )
        changes[key] = config[key] * signal
    # The changes are passed as keywords, since settings that a configuration took from defaults would be reset.
    return type(scheduler).from_config(config, **changes)


def _whole(number: float) -> float:
    """Return a whole number as an integer."""
    return int(number) if number == int(number) else number
