"""Name the settings that reduce a run's memory, after it has run out of memory."""

from __future__ import annotations

from diffalign.config import AnyRunConfig
from diffalign.training.memory_settings import micro_batches


def memory_advice(config: AnyRunConfig) -> str:
    """Return a text that names the settings which reduce memory, with their present values.

    Settings that cannot be reduced any further are left out. The settings change the run's results by rounding alone,
    except for the last, a quantised base model.
    """
    drawing, training, model = config.drawing, config.training, config.model
    sizes = micro_batches(config).items()
    parts = [f"a smaller {name} (now {size})" for name, size in sizes if size > 1]
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
