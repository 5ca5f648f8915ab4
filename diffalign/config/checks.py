"""What a configuration is refused with: the name of its field, and the nearest valid value."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.core.errors import UserError
from diffalign.core.nearest import nearest


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the field."""


def check(condition: bool, path: str, message: str) -> None:
    """ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{path}: {message}")


def one_of(value: str, choices: Sequence[str], path: str) -> None:
    """ConfigError for a value that is no choice, with the nearest that is."""
    check(value in choices, path, f"unknown value {value!r}{nearest(value, choices)}")


def positive(config: object, names: Sequence[str], group: str) -> None:
    """ConfigError for the first of the fields that is not above 0."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{group}.{name}", f"must be positive, got {value}")
