"""Schedulers of diffusers by a text such as "TCDScheduler,timestep_spacing=trailing"."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers

from diffalign.core.errors import UsageError


def scheduler_like(text: str, own: Any) -> Any:
    """Build a scheduler from another one's configuration and the settings of a text.

    Args:
        text: class name and settings, such as "TCDScheduler,timestep_spacing=trailing".
        own: scheduler whose configuration is used.

    Raises:
        UsageError: diffusers has no such class, or the class no such setting.
    """
    name, *settings = text.split(",")
    kind: Any = getattr(diffusers, name, None)
    if kind is None:
        raise UsageError(
            f"scheduler={name}: diffusers has no such class. Name one such as EulerDiscreteScheduler."
        )
    changes = dict(s.partition("=")[::2] for s in settings)
    unknown = set(changes) - set(inspect.signature(kind).parameters)
    if unknown:
        raise UsageError(
            f"scheduler={text}: {name} has no {', '.join(sorted(unknown))}. Choose settings of its constructor."
        )
    return kind.from_config(own.config, **{k: _value(v) for k, v in changes.items()})


def _value(text: str) -> Any:
    """Return the JSON value of a text, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
