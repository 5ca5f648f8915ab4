"""Name the settings that reduce a run's memory, after it has run out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffalign.config import AnyRunConfig, to_dict

MICRO_BATCH = ".micro_batch_size"


def memory_advice(config: AnyRunConfig) -> str:
    """Return a text that names the settings which reduce memory, with their present values.

    Settings that cannot be reduced any further are left out. The settings change the run's results by rounding alone,
    except for the last, a quantised base model.
    """
    drawing, training, model = config.drawing, config.training, config.model
    sizes = {path: size for path, size in _leaves(to_dict(config)) if path.endswith(MICRO_BATCH)}
    parts = [f"a smaller {name} (now {size})" for name, size in sizes.items() if size > 1]
    if not model.gradient_checkpointing:
        parts.append("model.gradient_checkpointing=true")
    if training.mixed_precision == "no":
        parts.append("training.mixed_precision=bf16")
    if model.dtype == "float32":
        parts.append("model.dtype=bfloat16")
    if drawing.merge_lora:
        parts.append(f"{drawing.group}.merge_lora=false")
    if not model.offload_encoders:
        parts.append("model.offload_encoders=true")
    if model.quantization is None:
        parts.append("model.quantization=int8 or int4")
    if model.memory is None:
        parts.append("model.memory=auto, which chooses among these")
    return "What helps: " + ", ".join(parts)


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every setting."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
