"""Name the settings that reduce a run's memory, after it has run out of memory."""

from __future__ import annotations

from diffalign.config import AnyRunConfig, LatentRunConfig, PreferenceRunConfig


def memory_advice(config: AnyRunConfig) -> str:
    """Return a text that names the settings which reduce memory, with their present values.

    Settings that cannot be reduced any further are left out. The settings change the run's results by rounding alone,
    except for the last, a quantised base model.
    """
    drawing, training, model = config.drawing, config.training, config.model
    sizes = {
        "training.micro_batch_size": training.micro_batch_size,
        f"{drawing.group}.micro_batch_size": drawing.micro_batch_size,
    }
    if isinstance(config, PreferenceRunConfig):
        sizes["pairs.micro_batch_size"] = config.pairs.micro_batch_size
    if isinstance(config, LatentRunConfig):
        sizes["latents.micro_batch_size"] = config.latents.micro_batch_size
    parts = [f"a smaller {name} (now {size})" for name, size in sizes.items() if size > 1]
    if not model.gradient_checkpointing:
        parts.append("model.gradient_checkpointing=true")
    if training.mixed_precision == "no":
        parts.append("training.mixed_precision=bf16")
    if model.dtype == "float32":
        parts.append("model.dtype=bfloat16")
    if drawing.merge_lora:
        parts.append(f"{drawing.group}.merge_lora=false")
    parts.append("a quantised base (`diffalign quantize`, then model.name)")
    return "What helps: " + ", ".join(parts)
