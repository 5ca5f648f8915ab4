"""Facts about single settings, which stand on the dataclass fields that they belong to."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field
from functools import cache
from types import MappingProxyType
from typing import Any


def setting(
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    free: bool = False,
    alias: str | tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field with facts about its setting.

    Args:
        default: default value.
        factory: function that makes the default value, instead of `default`.
        free: a resumed run may change the setting. It determines how long a run takes or how it is watched, but not
            what the run computes.
        alias: flags of diffusers' training scripts that stand for the setting. If settings of several groups have the
            same alias, it stands for those of the run's last group.
    """
    facts = {"free": free, "alias": (alias,) if isinstance(alias, str) else alias}
    if factory is not None:
        return field(default_factory=factory, metadata=facts)
    return field(default=default, metadata=facts)


@cache
def field_types(kind: type) -> Mapping[str, Any]:
    """Return the types of a class's fields by name."""
    # without the cache, resolving annotations takes most of the time in which a configuration is read
    return MappingProxyType(typing.get_type_hints(kind))
