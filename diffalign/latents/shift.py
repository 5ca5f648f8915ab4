"""One rule for the noise levels of a moved model, kept in its scheduler's configuration.

Training, evaluation and pipeline all read it from there, so that they cannot differ.
"""

from __future__ import annotations

import math
from typing import Any

from diffalign.core.errors import UsageError

TOKENS = ("base_image_seq_len", "max_image_seq_len")
MU = ("base_shift", "max_shift")
STATIC = ("flow_shift", "shift")


def moved_scheduler(scheduler: Any, *, ratio: int, signal: float = 1.0) -> Any:
    """A stock scheduler for the same images in a new space: an image is drawn at the base's noise levels for one of
    its size in pixels, shifted once more by `signal`.

    Args:
        ratio: old tokens along a side that a new one replaces.
        signal: r of s' = r s / (1 + (r - 1) s) on top; 1 changes nothing.

    Raises:
        UsageError: it has no shift to set.
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
                f"latents.shift: {type(scheduler).__name__} has no shift; use latents.shift=pixels"
            )
        changes[key] = config[key] * signal
    # as keywords: what a configuration took from defaults would go back to them
    return type(scheduler).from_config(config, **changes)


def _whole(number: float) -> float:
    """As an integer where it is one."""
    return int(number) if number == int(number) else number
