"""Checks of the names and types in a mapping of settings.

They run before a configuration is built.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from diffalign.config.checks import ConfigError
from diffalign.config.fields import field_types
from diffalign.config.methods import algorithm_class, kind_of
from diffalign.config.overrides import LISTS
from diffalign.config.settings import aliases_of, settings_of
from diffalign.core.nearest import nearest


def check_keys(kind: type, raw: Any, path: tuple[str, ...] = ()) -> None:
    """Check the names of settings, and values that the decoder would convert silently.

    Args:
        kind: dataclass of the settings.
        path: names of the groups that `raw` lies in.

    Raises:
        ConfigError: a name is unknown, or a value is null, true or false, or a fraction where it must not be.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{'.'.join(path)}: expected a group of settings, got {raw!r}")
    hints = field_types(kind)
    names = [f.name for f in fields(kind)]
    for key, value in raw.items():
        full = ".".join((*path, str(key)))
        if key not in names:
            raise ConfigError(_unknown(kind, full, path, names))
        kind_of_value = hints[key]
        choices = typing.get_args(kind_of_value)
        if value is None and type(None) not in choices:
            raise ConfigError(f"{full}: expected a value, got null")
        if len(choices) == 2 and type(None) in choices:
            kind_of_value = next(c for c in choices if c is not type(None))
        if is_dataclass(hints[key]):
            inner = typing.cast(type, hints[key])
            if key == "algorithm" and isinstance(value, Mapping):
                inner = algorithm_class(kind_of(value))
            check_keys(inner, value, (*path, str(key)))
        elif isinstance(value, bool) and kind_of_value in (int, float):
            raise ConfigError(f"{full}: expected a number, got {value}")
        elif kind_of_value is int and isinstance(value, float) and not value.is_integer():
            raise ConfigError(f"{full}: expected a whole number, got {value}")


def _unknown(kind: type, full: str, path: tuple[str, ...], names: Sequence[str]) -> str:
    """Return the message about an unknown setting, with the form that a recipe needs."""
    if path:
        return f"unknown setting {full!r}{nearest(full, ['.'.join((*path, n)) for n in names])}"
    every, aliases = settings_of(kind), aliases_of(kind)
    settings = aliases.get(full, (full,))
    if all(setting in every for setting in settings):
        nested = "; ".join(
            ": {".join(t.split(".")) + ": ..." + "}" * t.count(".") for t in settings
        )
        return f"setting {full!r} is a flag's name: in a recipe write `{nested}`"
    return f"unknown setting {full!r}{nearest(full, [*every, *aliases])}"


def with_lists(kind: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with comma-separated texts split if their type is a list."""
    hints = field_types(kind)
    settings = dict(raw)
    for key, value in raw.items():
        hint = hints.get(key)
        if hint in LISTS and isinstance(value, str):
            settings[key] = [part.strip() for part in value.split(",")]
        elif is_dataclass(hint) and isinstance(value, Mapping):
            inner = algorithm_class(kind_of(value)) if key == "algorithm" else hint
            settings[key] = with_lists(inner, value)
    return settings
