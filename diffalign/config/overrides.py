"""Overrides of settings: flags such as `--optimizer.learning_rate=1e-3`, or diffusers' names."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from diffalign.config.base import AnyRunConfig, LoopConfig
from diffalign.config.checks import ConfigError
from diffalign.config.fields import field_types
from diffalign.config.files import parse_yaml
from diffalign.config.settings import aliases_of, type_of

LISTS = (list[str], list[str] | None)
"""Types whose value may be a text with commas."""
ACCUMULATION = "gradient_accumulation_steps"
"""Flag of diffusers' scripts: one of three factors of the number of pairs per update."""


def split_flags(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return keys and texts of flags: `--a.b=1`, `--a.b 1` and bare `--flag` (true)."""
    result: list[tuple[str, str]] = []
    items = list(overrides)
    while items:
        item = items.pop(0)
        if not item.startswith("--"):
            raise ConfigError(f"expected --key=value, got {item!r}")
        key, equals, text = item[2:].partition("=")
        if not equals:
            text = items.pop(0) if items and not items[0].startswith("--") else "true"
        if key == "enable_xformers_memory_efficient_attention":
            key, text = "model.attention_backend", "xformers" if text == "true" else "null"
        result.append((key, text))
    return result


def parse_overrides(
    flags: Sequence[tuple[str, str]], run: type[AnyRunConfig], raw: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Return settings and values of flags; names of diffusers are translated for the run.

    Args:
        flags: keys and texts from `split_flags`.
        raw: settings of the recipe.

    Raises:
        ConfigError: a value cannot be read.
    """
    aliases = aliases_of(run)
    result: list[tuple[str, Any]] = []
    accumulation = None
    for key, text in flags:
        if key == ACCUMULATION and run.pairs_per_step:
            accumulation = text
            continue
        for name in aliases.get(key, (key,)):
            result.append((name, _parse_value(text, type_of(name, run), name)))
    if accumulation is not None:
        result.append(("training.pairs_per_update", _global_batch(accumulation, result, raw)))
    return result


def _global_batch(steps: str, settings: Sequence[tuple[str, Any]], raw: Mapping[str, Any]) -> int:
    """Return the pairs per update: accumulation steps x batch size x world size."""
    group = raw.get("training")
    recipe = group.get("micro_batch_size") if isinstance(group, Mapping) else None
    batch_size: Any = dict(settings).get("training.micro_batch_size")
    batch_size = batch_size or recipe or LoopConfig.micro_batch_size
    try:
        return int(steps) * int(batch_size) * int(os.environ.get("WORLD_SIZE", "1"))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{ACCUMULATION}: expected a whole number, got {steps!r}") from error


def _parse_value(text: str, kind: Any, name: str) -> Any:
    """Return the value of an override, whose text is YAML; correct mistakes of YAML 1.1."""
    # YAML would read "no" as false, and the revision 1e5 as a number
    if kind in (str, str | None):
        return None if kind is not str and text.lower() in ("null", "none") else text
    if kind in LISTS and not text.startswith("[") and text != "null":
        return [part.strip() for part in text.split(",")]
    try:
        value = parse_yaml(text, f"{name}={text}")
    except ConfigError:
        # an unknown name is reported later
        if kind is None:
            return text
        raise
    # YAML 1.1 reads 3e-4 as text
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None if value.lower() == "none" else value
    if isinstance(value, float) and value.is_integer() and kind in (int, int | None):
        return int(value)
    return value


def assign(raw: dict[str, Any], run: type[AnyRunConfig], path: str, value: Any) -> None:
    """Set one setting in the nested mapping `raw`.

    Raises:
        ConfigError: a part of the path is no group of settings.
    """
    steps = _steps(path, run)
    if steps[0] == "rewards" and len(steps) > 1 and "rewards" not in raw:
        # a reward on the command line is added to the default rewards, as it is to a recipe's
        raw["rewards"] = dict(_default(run, "rewards"))
    for key in steps[:-1]:
        inner = raw.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(steps)}: {key} is not a group of settings")
        raw = inner
    raw[steps[-1]] = value


def _steps(path: str, kind: Any) -> list[str]:
    """Split the path of a setting at its dots; a mapping's key stays whole."""
    steps, rest = [], path
    while rest and typing.get_origin(kind) is not dict:
        step, _, rest = rest.partition(".")
        steps.append(step)
        kind = field_types(typing.cast(type, kind)).get(step) if is_dataclass(kind) else None
    return [*steps, rest] if rest else steps


def _default(kind: type, name: str) -> Any:
    """Return the default of a dataclass field, made by its factory."""
    (factory,) = (f.default_factory for f in fields(kind) if f.name == name)
    assert callable(factory)
    return factory()
