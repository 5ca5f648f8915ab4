"""Combinations of the settings that reduce a run's memory, the cheapest first."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product

from diffalign.config import AnyRunConfig

Changes = dict[str, object]
"""Settings by path, "group.setting"."""


@dataclass(frozen=True)
class Lever:
    """Setting that reduces memory.

    Attributes:
        changes: the setting and its value.
        cost: price in time and in precision, for comparison with other levers only.
    """

    changes: Changes
    cost: float


ENCODERS = Lever({"model.offload_encoders": True}, 1.0)
CHECKPOINTS = Lever({"model.gradient_checkpointing": True}, 2.0)
HALF = Lever({"model.dtype": "bfloat16"}, 2.5)
INT8 = Lever({"model.quantization": "int8"}, 4.0)
INT4 = Lever({"model.quantization": "int4"}, 5.0)
EIGHT_BIT_MOMENTS = Lever({"optimizer.type": "adamw8bit"}, 3.5)
BLOCKS = Lever({"model.gradient_checkpointing": True, "model.offload_blocks": True}, 10.0)
"""Offloaded blocks, which need checkpoints. The cost has that of the checkpoints."""
SMALLER_BATCHES = 1.5
"""Cost of smaller micro-batches."""
SETTINGS = (
    "model.offload_encoders",
    "model.offload_blocks",
    "model.gradient_checkpointing",
    "model.dtype",
    "model.quantization",
    "optimizer.type",
)
"""Settings that `model.memory=auto` may change, besides merged weights and micro-batches."""


def combinations(config: AnyRunConfig) -> list[Lever]:
    """Return all combinations of levers that a run has, the cheapest first.

    The first changes nothing.
    """
    m, none = config.model, Lever({}, 0.0)
    axes: list[list[Lever]] = [[none]]
    if config.drawing.merge_lora:
        axes.append([none, Lever({f"{config.drawing.group}.merge_lora": False}, 0.5)])
    if not m.offload_encoders:
        axes.append([none, ENCODERS])
    if not m.gradient_checkpointing:
        axes.append([none, CHECKPOINTS])
    if m.dtype == "float32":
        axes.append([none, HALF])
    if m.quantization is None and not config.changes_base:
        axes.append([none, INT8, INT4])
    if config.optimizer.type == "adamw":
        axes.append([none, EIGHT_BIT_MOMENTS])
    if not (m.offload_blocks or m.compile or config.changes_base):
        axes.append([none, BLOCKS])
    # blocks bring their checkpoints along
    choices = [c for c in product(*axes) if not (BLOCKS in c and CHECKPOINTS in c)]
    joined = [_joined(levers) for levers in choices]
    return sorted((j for j in joined if _is_whole(config, j)), key=lambda lever: lever.cost)


def _joined(levers: tuple[Lever, ...]) -> Lever:
    changes: Changes = {k: v for lever in levers for k, v in lever.changes.items()}
    return Lever(changes, sum(lever.cost for lever in levers))


def _is_whole(config: AnyRunConfig, lever: Lever) -> bool:
    """Return whether the settings go together: merged weights exclude two others."""
    merges = config.drawing.merge_lora and f"{config.drawing.group}.merge_lora" not in lever.changes
    return not (merges and {"model.quantization", "model.offload_blocks"} & set(lever.changes))


def micro_batches(config: AnyRunConfig) -> dict[str, int]:
    """Return the sizes of a run's micro-batches by path."""
    groups = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        f"{name}.micro_batch_size": group.micro_batch_size
        for name, group in groups.items()
        if hasattr(group, "micro_batch_size")
    }


def changed(config: AnyRunConfig, changes: Mapping[str, object]) -> AnyRunConfig:
    """Return a copy of a configuration with some settings changed."""
    result = copy.deepcopy(config)
    for name, value in changes.items():
        group, _, field = name.partition(".")
        setattr(getattr(result, group), field, value)
    return result


def plain(config: AnyRunConfig) -> AnyRunConfig:
    """Return a copy in which settings of one `memory.MetaRun` have the same values."""
    values: Changes = dict.fromkeys(micro_batches(config), 1)
    values |= {
        "model.offload_encoders": False,
        "model.offload_blocks": False,
        "model.gradient_checkpointing": False,
        "model.memory": None,
        "model.embeds_cache": None,
        "optimizer.type": "adamw",
        f"{config.drawing.group}.merge_lora": False,
    }
    return changed(config, values)


def adopted(config: AnyRunConfig, other: AnyRunConfig) -> AnyRunConfig:
    """Return a configuration with the memory settings of another one."""
    names = [*SETTINGS, f"{config.drawing.group}.merge_lora", *micro_batches(config)]
    return changed(config, dict(_values(other, names)))


def _values(config: AnyRunConfig, names: list[str]) -> Iterator[tuple[str, object]]:
    for name in names:
        group, _, field = name.partition(".")
        yield name, getattr(getattr(config, group), field)


def spelt(changes: Mapping[str, object]) -> str:
    """Return settings as a user types them, "as it is" for none."""
    return " ".join(f"{k}={str(v).lower()}" for k, v in changes.items()) or "as it is"
