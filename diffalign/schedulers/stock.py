"""Schedulers of diffusers in a word: "LCMScheduler", "TCDScheduler,timestep_spacing=trailing"."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers

from diffalign.core.errors import UsageError


def scheduler_like(asked: str, own: Any) -> Any:
    """One of that class with the configuration of another and the settings that follow the name.

    Raises:
        UsageError: diffusers has no such class, or the class no such setting.
    """
    name, *settings = asked.split(",")
    kind: Any = getattr(diffusers, name, None)
    if kind is None:
        raise UsageError(f"scheduler: diffusers has no {name}")
    changes = dict(s.partition("=")[::2] for s in settings)
    unknown = set(changes) - set(inspect.signature(kind).parameters)
    if unknown:
        raise UsageError(f"scheduler: {name} has no {', '.join(sorted(unknown))}")
    return kind.from_config(own.config, **{k: _value(v) for k, v in changes.items()})


def _value(text: str) -> Any:
    """JSON where it is some, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
