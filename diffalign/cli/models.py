"""Model and generation settings that the shared flags describe.

The module imports torch, so verbs import it inside `run`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign.cli.flags import DrawingFlags, ModelFlags, SampleFlags
from diffalign.core.fingerprint import of_place
from diffalign.data.prompts import Prompt, load_prompts, spread
from diffalign.lora.files import load_lora, read_lora
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import DrawingCard, card_of
from diffalign.pipelines.checks import check_steps
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_meta_model, load_model


def settle_drawing(flags: ModelFlags) -> DrawingCard:
    """Complete the generation settings from the model's card, and print them.

    Raises:
        UsageError: the model's scheduler does not support the number of steps.
    """
    card = card_of(flags.model).updated(vars(flags))
    check_steps(flags.model, card.num_inference_steps)
    for name, value in vars(card).items():
        if hasattr(flags, name):
            setattr(flags, name, value)
    if os.environ.get("RANK", "0") == "0":
        print(f"{flags.model} draws in {card}", flush=True)
    return card


def load(flags: ModelFlags, *, adapters: bool = True) -> TextToImageModel:
    """Load the model of --model, with --lora as adapters."""
    # sizes and the LoRA are checked before the model's weights are read
    check_drawing(flags)
    lora = read_lora(flags.lora) if adapters and flags.lora is not None else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(flags.model, dtype=dtype_of(flags), device=device)
    if lora is not None:
        load_lora(model.pipeline, lora)
    return model


def check_drawing(flags: ModelFlags) -> None:
    """Raise UsageError for sizes that the model cannot generate; read no weights."""
    height, width = (getattr(flags, side, None) for side in ("height", "width"))
    if height is None and width is None:
        return
    try:
        plan = load_meta_model(flags.model, dtype=dtype_of(flags))
    # loading the model reports the same error in full
    except Exception:
        return
    plan.latent_shape(plan.image_size((height, width)))


def dtype_of(flags: ModelFlags) -> torch.dtype:
    """Return the torch dtype that --dtype names."""
    dtype: torch.dtype = getattr(torch, flags.dtype)
    return dtype


def drawing(flags: DrawingFlags, *, mixed_precision: str | None = None) -> Drawing:
    """Return the settings of image generation.

    Args:
        mixed_precision: replaces the precision that follows from --dtype.
    """
    return Drawing(
        flags.num_inference_steps,
        flags.guidance_scale,
        (flags.height, flags.width),
        flags.solver,
        images_per_prompt=flags.images_per_prompt,
        images_per_task=flags.images_per_task,
        seed=flags.seed,
        micro_batch_size=flags.batch_size,
        mixed_precision=mixed_precision or ("bf16" if flags.dtype == "bfloat16" else "no"),
    )


def recorded(flags: SampleFlags) -> dict[str, Any]:
    """Return the settings of image generation that a result records."""
    names = ("model", "lora", "prompts", "num_inference_steps", "solver", "guidance_scale", "seed")
    return {name: getattr(flags, name) for name in names}


def made_with(flags: SampleFlags) -> dict[str, Any]:
    """Return the settings that a folder of samples records in its settings file."""
    return {
        **recorded(flags),
        "model_fingerprint": of_place(flags.model),
        "lora_fingerprint": of_place(flags.lora),
        "max_prompts": flags.max_prompts,
        "images_per_prompt": flags.images_per_prompt,
        "height": flags.height,
        "width": flags.width,
        "dtype": flags.dtype,
        "record_states": flags.record_states,
    }


def fill(
    flags: SampleFlags,
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    states: int | None = None,
    bar: str = "images",
) -> None:
    """Generate the samples that a folder lacks, with a progress bar.

    Args:
        states: number of sampler states to record per image.
        bar: label of the progress bar.
    """
    from diffalign.core import console
    from diffalign.evaluation.fill import fill_folder

    with console.counting(bar) as progress:
        fill_folder(
            folder,
            prompts,
            lambda: load(flags),
            drawing(flags),
            made=made_with(flags),
            states=states,
            progress=progress,
        )


def chosen_prompts(flags: SampleFlags) -> list[Prompt]:
    """Load the prompts, and print how many are used if --max_prompts leaves some out."""
    prompts = load_prompts(flags.prompts)
    few = spread(prompts, flags.max_prompts)
    if len(few) < len(prompts):
        print(f"{len(few)} of {len(prompts)} prompts are used (--max_prompts)")
    return few


def load_reference(
    reference: str | None, flags: ModelFlags, model: TextToImageModel
) -> TextToImageModel | None:
    """Load the model `reference` onto the device of `model`, or return None without it."""
    if reference is None:
        return None
    return load_model(reference, dtype=dtype_of(flags), device=model.device)
