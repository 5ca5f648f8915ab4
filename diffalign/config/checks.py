"""Checks of settings.

Errors name the field and, for a misspelt value, the nearest valid one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from diffalign.core.errors import UserError
from diffalign.core.nearest import nearest

MAX_COUNT = 10**6
"""Largest valid integer of a field that `RANGES` does not name."""
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "height": (1, 2**14),
    "width": (1, 2**14),
    "guidance_scale": (0, math.inf),
    "max_sequence_length": (1, MAX_COUNT),
    # a model's layers are narrower than that, which is known only once it is loaded
    "rank": (1, 4096),
    # images of a whole dataset
    "limit": (-math.inf, 2**63 - 1),
    # a very large number means never
    "checkpoint_every": (-math.inf, 2**63 - 1),
    "eval_every": (-math.inf, 2**63 - 1),
    "sample_every": (-math.inf, 2**63 - 1),
}
"""Smallest and largest valid value of a field, by its name in any dataclass."""


class ConfigError(UserError, ValueError):
    """Configuration that cannot be run; the message names the field."""


def check(condition: bool, path: str, message: str) -> None:
    """Raise ConfigError about the field `path` unless the condition holds."""
    if not condition:
        raise ConfigError(message, setting=path)


def one_of(value: str, choices: Sequence[str], path: str) -> None:
    """Raise ConfigError for a value that is not in `choices`, and name the nearest choice."""
    check(value in choices, path, f"unknown value {value!r}{nearest(value, choices)}")


def positive(config: object, names: Sequence[str], group: str) -> None:
    """Raise ConfigError for the first of these fields that is not above 0."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{group}.{name}", f"must be positive, got {value}")


def at_least(config: object, names: Sequence[str], group: str, *, least: int = 1) -> None:
    """Raise ConfigError for the first of these fields that is below `least`; None passes."""
    bound = f"be at least {least}" if least else "not be negative"
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= least, f"{group}.{name}", f"must {bound}, got {value}")


def check_numbers(config: Any, group: str = "") -> None:
    """Check the numbers in a dataclass and in the dataclasses nested in it.

    Raises:
        ConfigError: a number that is not finite, a seed outside 0..2**63-1, sizes below 1, counts above
            `MAX_COUNT` or negative guidance.
    """
    for field in fields(config):
        path, value = f"{group}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_numbers(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check(math.isfinite(value), path, f"must be a finite number, got {value}")
            most = MAX_COUNT if str(field.type).startswith("int") else math.inf
            least, most = RANGES.get(field.name, (-math.inf, most))
            bounds = f"in {least}..{most}"
            if math.inf in (most, -least):
                bounds = f"at least {least}" if most == math.inf else f"at most {most}"
            check(least <= value <= most, path, f"must be {bounds}, got {value}")
