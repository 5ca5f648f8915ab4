"""All settings of a kind of run: their paths, their types, and the facts on their fields."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from diffalign.config.base import AnyRunConfig, MethodConfig
from diffalign.config.fields import field_types
from diffalign.config.methods import algorithm_class, available


def algorithm_classes() -> list[type[MethodConfig]]:
    """Return the dataclasses of all algorithms' settings."""
    return [algorithm_class(name) for name in available()]


def settings_of(run: type[AnyRunConfig]) -> dict[str, Field[Any]]:
    """Return the field of every setting and group of a run, by its path.

    The group `algorithm` has the settings of all algorithms that the run can have.
    """
    return dict(_walk(run, ""))


def _walk(kind: type, prefix: str) -> Iterator[tuple[str, Field[Any]]]:
    hints = field_types(kind)
    for field in fields(kind):
        yield prefix + field.name, field
        hint = hints[field.name]
        if not is_dataclass(hint):
            continue
        inner = [typing.cast(type, hint)]
        if field.name == "algorithm":
            inner = [k for k in algorithm_classes() if issubclass(k, inner[0])]
        for part in inner:
            yield from _walk(part, f"{prefix}{field.name}.")


def aliases_of(run: type[AnyRunConfig]) -> dict[str, tuple[str, ...]]:
    """Return the flags of diffusers' scripts, with the settings that they stand for."""
    aliases: dict[str, tuple[str, ...]] = {}
    for path, field in settings_of(run).items():
        for alias in field.metadata.get("alias", ()):
            group = path.rpartition(".")[0]
            others = (p for p in aliases.get(alias, ()) if p.rpartition(".")[0] == group)
            aliases[alias] = (*others, path)
    return aliases


def free_settings(run: type[AnyRunConfig]) -> set[str]:
    """Return the settings that a resumed run may change."""
    return {path for path, field in settings_of(run).items() if field.metadata.get("free")}


def type_of(path: str, run: type[AnyRunConfig]) -> Any:
    """Return the type hint of a setting, or None for an unknown setting."""
    head, _, rest = path.partition(".")
    # the class of the algorithm is not needed: a name has one type in all algorithms
    if head == "algorithm" and rest:
        hints = [field_types(typing.cast(type, kind)) for kind in algorithm_classes()]
        return next((h[rest] for h in hints if rest in h), None)
    kind: Any = run
    for key in path.split("."):
        kind = field_types(typing.cast(type, kind)).get(key) if is_dataclass(kind) else None
    return kind
