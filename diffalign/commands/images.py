"""The verb generate, and how every verb that makes images loads its model."""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from diffalign.config import EvaluationConfig
from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt, load_prompts, spread
from diffalign.evaluation.report import image_grid
from diffalign.evaluation.score import evaluate_model
from diffalign.lora.files import load_lora
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import load_model
from diffalign.types import no_reward

SMALL = 500_000_000
"""Bytes up to which a file is hashed whole."""


def load(args: argparse.Namespace) -> TextToImageModel:
    """The model of --model, with --lora."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, dtype=getattr(torch, args.dtype), device=device)
    if args.lora is not None:
        place = args.lora.rpartition(":")[0] or args.lora
        if not any(Path(p).exists() for p in (args.lora, place)) and place.count("/") != 1:
            raise UsageError(f"--lora: {args.lora} does not exist")
        load_lora(model.pipeline, args.lora)
    return model


def fingerprint(name: str | None) -> str | None:
    """What tells a local file or folder from what it was before: a hash of small files, sizes and times of large ones;
    None for names and hub ids."""
    path = Path(name) if name else None
    if path is None or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        whole = size < SMALL
        digest.update(file.read_bytes() if whole else str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


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


def generate(args: argparse.Namespace) -> int:
    """Write every image as PNG, and a grid."""
    prompts: list[Prompt] = []
    for text in args.prompts:
        prompts += load_prompts(text) if text.endswith((".txt", ".jsonl")) else [Prompt(text)]
    model = load(args)
    found = evaluate_model(model, prompts, no_reward, evaluation(args), **batching(args))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(found.prompts, found.images, strict=True)):
        name = re.sub(r"[^a-z0-9]+", "-", prompt.text.lower()).strip("-")[:60]
        image_grid(image[None], columns=1, gap=0).save(folder / f"{i:04d}-{name}.png")
    image_grid(found.images, columns=args.images_per_prompt).save(folder / "grid.png")
    print(f"{len(found.prompts)} images in {folder}, all of them in {folder / 'grid.png'}")
    return 0
