"""PEFT's configurations of LoRAs: which of them are read, and the strength that they give a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from diffalign.core.errors import UsageError
from diffalign.core.text import parse_json

METADATA = "lora_adapter_metadata"
LARGEST = 1e6
"""Bound of alpha and rank; larger values are damage, and overflow."""
# initialisations that change the base weights as well, which a file of adapters does not hold
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|eva_", re.IGNORECASE)
_SWITCHES = ("use_rslora", "use_dora", "lora_bias")


def header_configs(header: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """Return component -> PEFT's configuration from diffusers' header.

    Raises:
        UsageError: the header is not readable, or a configuration is not one of a LoRA.
    """
    if METADATA not in header:
        return {}
    flat = parse_json(header[METADATA], f"{path}: {METADATA} of its header", error=UsageError)
    if not isinstance(flat, dict):
        raise UsageError(f"{path}: {METADATA} of its header is no mapping. Export the LoRA again.")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        configs.setdefault(part, {})[name] = value
    return {part: checked(config, path) for part, config in configs.items()}


def checked(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the configuration of the LoRA in `path`.

    Raises:
        UsageError: its update is not that of a LoRA's matrices, or a setting has no usable value.
    """
    kind = config.get("peft_type") or "LORA"
    start = str(config.get("init_lora_weights") or "")
    if str(kind).rpartition(".")[2] != "LORA":
        raise UsageError(f"{path}: peft_type={kind}; only LORA is read")
    if _CHANGES_BASE.search(start):
        raise UsageError(
            f"{path}: init_lora_weights={start!r} changes the base's weights as well, which no adapter file holds. "
            "Save it with PEFT's path_initial_model_for_weight_conversion first."
        )
    for name in _SWITCHES:
        if not isinstance(config.get(name), bool | None):
            raise UsageError(
                f"{path}: {name}={config[name]!r} of its configuration is neither true nor false. Correct it."
            )
    if config.get("lora_bias"):
        raise UsageError(
            f"{path}: lora_bias=true trains biases, which are not read. Train with lora_bias=false, or merge with PEFT."
        )
    for name, check in (("lora_alpha", check_alpha), ("r", _check_rank)):
        if config.get(name) is not None:
            check(config[name], name, path)
    for name, check in (("alpha_pattern", check_alpha), ("rank_pattern", _check_rank)):
        for pattern, value in _patterns(config, name, path).items():
            check(value, f"{name}[{pattern!r}]", path)
    return dict(config)


def _patterns(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise UsageError(
            f"{path}: {name}={patterns!r} of its configuration is no mapping of names. Correct it."
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f"{path}: {name}[{pattern!r}] of its configuration is no pattern of names: {error}. Correct it."
            ) from error
    return patterns


def check_alpha(value: Any, name: str, path: Path) -> None:
    """Refuse an alpha with which no LoRA is trained. `name` is the setting or tensor."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN compares false
    if not (number and abs(value) <= LARGEST):
        raise UsageError(
            f"{path}: {name}={value!r} is no number of at most {LARGEST:.0f}. Correct it: it is the alpha with which "
            "the LoRA was trained."
        )


def _check_rank(value: Any, name: str, path: Path) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 1 <= value <= LARGEST and math.floor(value) == value):
        raise UsageError(
            f"{path}: {name}={value!r} is no whole number of at least 1. Correct it: it is the rank with which the "
            "LoRA was trained."
        )


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float | None:
    """Return a module's alpha, to be divided by its rank. None where the configuration has none."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config.get("lora_alpha"))
    if alpha is None:
        return None
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)
