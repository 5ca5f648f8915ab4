"""Requests of noise levels to a scheduler, and their comparison with those of a calibration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.core.fingerprint import of_json

Request = dict[str, Any]
"""Arguments of `set_timesteps`, and the scheduler's noise levels and settings after it.

All values are those of JSON.
"""
LEVELS, SETTINGS = "levels", "settings"
"""Names of the noise levels and of the scheduler's settings in a request."""
TOLERANCE = 1e-5
"""Largest difference of two noise levels that are the same, relative to the largest level."""


def request_of(scheduler: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
    """Return what a call of `set_timesteps` asks of a scheduler.

    Args:
        scheduler: scheduler of diffusers, after the call.
        args: positional arguments of the call.
        kwargs: other arguments of the call.
    """
    levels = {LEVELS: _levels(scheduler), SETTINGS: scheduler_settings(scheduler)}
    return _arguments(scheduler, args, kwargs) | levels


def scheduler_settings(scheduler: Any) -> str:
    """Return 16 hex digits of a scheduler's settings."""
    settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return of_json(settings, default=str)[:16]


def asks_same(calibrated: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Return whether two requests pass the same arguments to `set_timesteps`."""
    own, other = (
        {k: v for k, v in r.items() if k not in (LEVELS, SETTINGS)} for r in (calibrated, request)
    )
    return own == other


def is_same(calibrated: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Return whether a request has the arguments, noise levels and settings of a calibration.

    Calibrations of earlier versions hold the arguments only.
    """
    if not asks_same(calibrated, request):
        return False
    if calibrated.get(SETTINGS, request[SETTINGS]) != request[SETTINGS]:
        return False
    pairs = zip(calibrated.get(LEVELS, request[LEVELS]), request[LEVELS], strict=True)
    return all(_are_close(own, other) for own, other in pairs)


def has_levels_of(calibrated: Mapping[str, Any], scheduler: Any) -> bool:
    """Return whether a scheduler has the noise levels and settings of a calibration.

    Whoever set the timesteps may have passed other arguments. Calibrations of earlier versions hold no noise levels.
    """
    if calibrated.get(SETTINGS) != scheduler_settings(scheduler) or LEVELS not in calibrated:
        return False
    pairs = zip(calibrated[LEVELS], _levels(scheduler), strict=True)
    return all(_are_close(own, other) for own, other in pairs)


def _are_close(own: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two rows of noise levels differ in their last bits only."""
    tolerance = TOLERANCE * max(map(abs, own), default=0.0)
    return len(own) == len(other) and all(
        math.isclose(a, b, rel_tol=0, abs_tol=tolerance) for a, b in zip(own, other, strict=True)
    )


def _arguments(scheduler: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
    """Return the arguments of `set_timesteps` that decide on the noise levels."""
    signature = inspect.signature(type(scheduler).set_timesteps)
    try:
        values = dict(signature.bind(scheduler, *args, **kwargs).arguments)
    except TypeError:
        # wrappers take any arguments
        values = dict(kwargs)
        if args:
            values["num_inference_steps"] = args[0]
    values |= values.pop("kwargs", {})
    if len(rest := values.pop("args", ())) > 0:
        values["num_inference_steps"] = rest[0]
    plain = {k: _plain(v) for k, v in values.items() if k not in ("self", "device")}
    plain = {k: v for k, v in plain.items() if v is not None}
    for name in ("sigmas", "timesteps"):
        # diffusers' pipelines pass either the number or the levels
        if name in plain:
            plain["num_inference_steps"] = len(plain[name])
    return plain


def _levels(scheduler: Any) -> list[list[float]]:
    """Return a scheduler's timesteps and its sigmas, each empty where it has none."""
    values = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    return [_plain(_numbers(v)) for v in values]


def _numbers(values: Any) -> list[float]:
    """Return the numbers of a tensor or a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return [float(v) for v in values or ()]


def _plain(value: Any) -> Any:
    """Return numbers that are rounded, so that the last bits do not count."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value
