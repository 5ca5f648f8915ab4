"""Model and generation settings that the shared flags describe.

The module imports torch, so verbs import it inside `run`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign.config import EvaluationConfig
from diffalign.core.fingerprint import of_place
from diffalign.data.prompts import Prompt, load_prompts, spread
from diffalign.lora.files import load_lora, read_lora
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import DrawingCard, card_of
from diffalign.pipelines.registry import check_steps, load_meta_model, load_model
from diffalign.tuning.evaluator import Drawing


def settle_drawing(args: argparse.Namespace) -> DrawingCard:
    """Complete the generation settings from the model's card, and print them.

    Raises:
        UsageError: the model's scheduler does not support the number of steps.
    """
    card = card_of(args.model).updated(vars(args))
    check_steps(args.model, card.num_inference_steps)
    for name, value in vars(card).items():
        if hasattr(args, name):
            setattr(args, name, value)
    if os.environ.get("RANK", "0") == "0":
        print(f"{args.model} draws in {card}", flush=True)
    return card


def load(args: argparse.Namespace, *, adapters: bool = True) -> TextToImageModel:
    """Load the model of --model, with --lora as adapters."""
    # sizes and the LoRA are checked before the model's weights are read
    check_drawing(args)
    lora = read_lora(args.lora) if adapters and args.lora is not None else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, dtype=dtype_of(args), device=device)
    if lora is not None:
        load_lora(model.pipeline, lora)
    return model


def check_drawing(args: argparse.Namespace) -> None:
    """Raise UsageError for sizes that the model cannot generate; read no weights."""
    height, width = (getattr(args, side, None) for side in ("height", "width"))
    if height is None and width is None:
        return
    try:
        plan = load_meta_model(args.model, dtype=dtype_of(args))
    # loading the model reports the same error in full
    except Exception:
        return
    own = plan.default_size
    plan.latent_shape(height or own[0], width or own[1])


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """Return the torch dtype that --dtype names."""
    dtype: torch.dtype = getattr(torch, args.dtype)
    return dtype


def evaluation(args: argparse.Namespace) -> EvaluationConfig:
    """Return the settings of image generation."""
    return EvaluationConfig(
        num_inference_steps=args.num_inference_steps,
        solver=args.solver,
        guidance_scale=args.guidance_scale,
        images_per_prompt=args.images_per_prompt,
        images_per_task=getattr(args, "images_per_task", None),
        seed=args.seed,
    )


def drawing(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of image generation that a result records."""
    names = ("model", "lora", "prompts", "num_inference_steps", "solver", "guidance_scale", "seed")
    return {name: getattr(args, name) for name in names}


def made_with(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a folder of samples records in its settings file."""
    return {
        **drawing(args),
        "model_fingerprint": of_place(args.model),
        "lora_fingerprint": of_place(args.lora),
        "max_prompts": args.max_prompts,
        "images_per_prompt": args.images_per_prompt,
        "height": args.height,
        "width": args.width,
        "dtype": args.dtype,
        "record_states": getattr(args, "record_states", None),
    }


def fill(
    args: argparse.Namespace, folder: Path, prompts: Sequence[Prompt], *, states: int | None = None
) -> None:
    """Generate the samples that a folder lacks, with a progress bar.

    Args:
        states: number of sampler states to record per image.
    """
    from diffalign.core import console
    from diffalign.evaluation.fill import fill_folder

    with console.counting("images") as progress:
        fill_folder(
            folder,
            prompts,
            lambda: load(args),
            evaluation(args),
            made=made_with(args),
            states=states,
            progress=progress,
            **batching(args),
        )


def chosen_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Load the prompts, and print how many are used if --max_prompts leaves some out."""
    prompts = load_prompts(args.prompts)
    few = spread(prompts, args.max_prompts)
    if len(few) < len(prompts):
        print(f"{len(few)} of {len(prompts)} prompts are used (--max_prompts)")
    return few


def batching(args: argparse.Namespace) -> dict[str, Any]:
    """Return image size, batch size and precision of generation."""
    return {
        "height": args.height,
        "width": args.width,
        "micro_batch_size": args.batch_size,
        "mixed_precision": "bf16" if args.dtype == "bfloat16" else "no",
    }


def load_reference(args: argparse.Namespace, model: TextToImageModel) -> TextToImageModel | None:
    """Load the model of --reference onto the device of `model`, or return None without it."""
    if args.reference is None:
        return None
    return load_model(args.reference, dtype=dtype_of(args), device=model.device)


def calibration_drawing(args: argparse.Namespace, *, mixed_precision: str | None = None) -> Drawing:
    """Return the settings that generate calibration images.

    Args:
        mixed_precision: replaces the precision that follows from --dtype.
    """
    return Drawing(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        images_per_prompt=getattr(args, "images_per_prompt", 1),
        seed=args.seed,
        micro_batch_size=args.batch_size,
        mixed_precision=mixed_precision or ("bf16" if args.dtype == "bfloat16" else "no"),
    )
