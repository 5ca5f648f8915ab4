"""Merging of a LoRA into a pipeline's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FluxPipeline
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from diffalign.core.errors import UsageError
from diffalign.lora.files import merge_lora
from diffalign.lora.formats import Lora
from diffalign.pipelines import flux
from diffalign.pipelines.cards import CARD, FEW_STEPS, STUDENTS, DrawingCard, card_of
from diffalign.schedulers.stock import scheduler_like


def merge(
    pipeline: Any, lora: Lora, *, scheduler: str | None = None, fold_guidance: float | None = None
) -> None:
    """Merge a LoRA into a pipeline's weights, in place and in float32.

    Args:
        scheduler: name or folder of a new scheduler, see `read_scheduler`.
        fold_guidance: guidance scale whose embedding is folded into the weights, as in FLUX.1-schnell.

    Raises:
        UsageError: the LoRA does not fit, the pipeline is quantised, it has no guidance to fold, or the scheduler does
            not exist.
    """
    merge_lora(pipeline, lora)
    if fold_guidance is not None:
        if not isinstance(pipeline, FluxPipeline):
            raise UsageError(f"fold_guidance: is for FLUX, and a {type(pipeline).__name__} is none")
        pipeline.register_modules(
            transformer=flux.fold_guidance(pipeline.transformer, fold_guidance)
        )
    if scheduler is not None:
        pipeline.register_modules(scheduler=read_scheduler(scheduler, pipeline.scheduler))


def merged_card(
    model: str, *, scheduler: str | None = None, guidance: float | None = None
) -> DrawingCard:
    """Return the card of a merged model; see `merge` for the arguments."""
    card = card_of(model)
    if scheduler is not None and (Path(scheduler) / CARD).is_file():
        student = DrawingCard.load(Path(scheduler) / CARD)
        card = replace(
            card,
            num_inference_steps=student.num_inference_steps,
            guidance_scale=student.guidance_scale,
        )
    elif scheduler is not None and scheduler.partition(",")[0] in STUDENTS:
        card = replace(card, num_inference_steps=FEW_STEPS, guidance_scale=None)
    return card if guidance is None else replace(card, guidance_scale=None)


def read_scheduler(name: str, own: Any) -> Any:
    """Load a scheduler from a folder, or build one from a class name.

    A folder holds `scheduler_config.json`, which names the class. A class of diffusers is built with the configuration
    of `own` and the options after its name: "TCDScheduler,timestep_spacing=trailing".

    Raises:
        UsageError: the folder holds no scheduler, or diffusers has no such class.
    """
    folder = Path(name)
    if not folder.exists() and "Scheduler" in name and "/" not in name:
        return scheduler_like(name, own)
    try:
        config = json.loads((folder / SCHEDULER_CONFIG_NAME).read_text(encoding="utf-8"))
        return getattr(diffusers, config["_class_name"]).from_pretrained(folder)
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise UsageError(f"scheduler: {folder} holds no scheduler: {error}") from error
