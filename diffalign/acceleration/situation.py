"""Facts that decide which options can work: the call that an acceleration is made for, and its pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from diffalign.acceleration.attention import parts_of
from diffalign.acceleration.conditions import why_no_cache
from diffalign.acceleration.drawing import PROMPTS, Call, default_steps, draw
from diffalign.acceleration.guidance import guides
from diffalign.acceleration.options import Options
from diffalign.acceleration.parts import denoiser_of
from diffalign.acceleration.rules import Situation
from diffalign.core.errors import UsageError


def call_of(pipeline: Any, options: Options) -> Call:
    """Return the call that the first of the sizes is calibrated and checked with."""
    steps = options.steps or default_steps(pipeline)
    height, width = options.sizes[0] if options.sizes else _default_size(pipeline)
    prompts = tuple(options.prompts) or PROMPTS
    return Call(steps, height, width, prompts, dict(options.arguments), options.seed)


def _default_size(pipeline: Any) -> tuple[int, int]:
    from diffalign.pipelines.registry import FAMILIES, wrap_pipeline

    if type(pipeline).__name__ in FAMILIES:
        height, width = wrap_pipeline(pipeline).default_size
        return height, width
    raise UsageError(
        f"sizes=(): the default size of {type(pipeline).__name__} is unknown. Pass sizes=((height, width),)."
    )


def situation_of(pipeline: Any, call: Call, active: Mapping[str, Any]) -> Situation:
    """Return the facts about a pipeline that the rules look at."""
    from diffalign.pipelines.compiled import blocks

    denoiser = denoiser_of(pipeline)
    device = denoiser.device
    is_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if is_cuda else (0, 0)
    guide = True
    if "guidance" in active:
        # a pipeline learns its guidance in a call only
        draw(pipeline, replace(call.take(1), steps=2))
        guide = guides(pipeline)
    return Situation(
        steps=call.steps,
        device=device.type,
        capability=capability,
        cache_problem=why_no_cache(pipeline, steps=call.steps),
        has_lora=bool(getattr(denoiser, "peft_config", None)),
        has_factors=bool(pipeline.scheduler.config.get("qsched")),
        is_quantized=bool(getattr(denoiser, "is_quantized", False)),
        guides=guide,
        attention_parts=len(parts_of(denoiser)),
        block_lists=bool(blocks(denoiser)),
    )
