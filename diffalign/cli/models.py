"""The model and the drawing that the shared flags describe. Imports torch: verbs import it inside `run`."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from diffalign.config import EvaluationConfig
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_place
from diffalign.data.prompts import Prompt, load_prompts, spread
from diffalign.lora.files import load_lora, read_lora
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import DrawingCard, card_of
from diffalign.pipelines.registry import check_steps, load_model


def settle_drawing(args: argparse.Namespace) -> DrawingCard:
    """Fill in what the flags leave open of how --model draws, from the model's card, and say how it draws.

    Raises:
        UsageError: the model's scheduler makes no such number of steps.
    """
    card = card_of(args.model).updated(vars(args))
    try:
        check_steps(args.model, card.num_inference_steps)
    except UsageError as error:
        raise UsageError(f"--{error}") from error
    for name, value in vars(card).items():
        if hasattr(args, name):
            setattr(args, name, value)
    if os.environ.get("RANK", "0") == "0":
        print(f"{args.model} draws in {card}", flush=True)
    return card


def load(args: argparse.Namespace, *, adapters: bool = True) -> TextToImageModel:
    """Load the model of --model, with --lora as adapters; the LoRA is read before the model."""
    lora = read_lora(args.lora) if adapters and args.lora is not None else None
    model = load_model(
        args.model,
        dtype=getattr(torch, args.dtype),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if lora is not None:
        load_lora(model.pipeline, lora)
    return model


def evaluation(args: argparse.Namespace) -> EvaluationConfig:
    """How images are drawn."""
    return EvaluationConfig(
        num_inference_steps=args.num_inference_steps,
        solver=args.solver,
        guidance_scale=args.guidance_scale,
        images_per_prompt=args.images_per_prompt,
        images_per_task=getattr(args, "images_per_task", None),
        seed=args.seed,
    )


def drawing(args: argparse.Namespace) -> dict[str, Any]:
    """How --model draws images, for a result."""
    names = ("model", "lora", "prompts", "num_inference_steps", "solver", "guidance_scale", "seed")
    return {name: getattr(args, name) for name in names}


def made_with(args: argparse.Namespace) -> dict[str, Any]:
    """How a folder of samples is made, for its settings file."""
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


def chosen_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Those of the file, or some of them: that is said."""
    if args.max_prompts < 1:
        raise UsageError(f"--max_prompts must be at least 1, got {args.max_prompts}")
    found = load_prompts(args.prompts)
    few = spread(found, args.max_prompts)
    if len(few) < len(found):
        print(f"{len(few)} of {len(found)} prompts are used (--max_prompts)")
    return few


def batching(args: argparse.Namespace) -> dict[str, Any]:
    """In what sizes and precision."""
    return {
        "height": args.height,
        "width": args.width,
        "micro_batch_size": args.batch_size,
        "mixed_precision": "bf16" if args.dtype == "bfloat16" else "no",
    }


def load_reference(args: argparse.Namespace, model: TextToImageModel) -> TextToImageModel | None:
    """Load the model of --reference beside `model`; None where there is none."""
    if args.reference is None:
        return None
    return load_model(args.reference, dtype=getattr(torch, args.dtype), device=model.device)
