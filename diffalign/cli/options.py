"""Groups of flags that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.core.errors import UsageError

BATCH_SIZE = 64
"""Images that are looked at, not drawn, at a time."""
DTYPES = ("bfloat16", "float16", "float32")


def add_model(parser: argparse.ArgumentParser, *, lora: bool = True) -> None:
    """Add --model, --lora and --dtype."""
    parser.add_argument(
        "--model",
        default="shapes-sd3",
        help="name, folder, .safetensors file or hub id (owner/name@revision); default: %(default)s",
    )
    if lora:
        parser.add_argument(
            "--lora", default=None, help="folder, file or hub id; behind a colon the file in it"
        )
    parser.add_argument(
        "--dtype", default=None, choices=DTYPES, help="default: that of the model's card"
    )


def add_drawing(parser: argparse.ArgumentParser, *, solver: bool = True, seed: int = 1000) -> None:
    """Add how images are drawn; `solver`: the verb can draw with another solver than the model's own.

    What is not given is the model's card's (`cli.models.settle_drawing`).
    """
    parser.add_argument(
        "--num_inference_steps", type=int, default=None, help="default: that of the model's card"
    )
    if solver:
        parser.add_argument(
            "--solver",
            default="default",
            choices=("default", "adams_bashforth"),
            help="see docs/awm.md",
        )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=None,
        help="1: none; default: that of the model's card",
    )
    parser.add_argument("--height", type=int, default=None, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, default=None, help="pixels; default: the model's")
    parser.add_argument("--seed", type=int, default=seed, help="default: %(default)s")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=None,
        help="images at a time; default: that of the model's card",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Add --batch_size of a verb that draws nothing."""
    parser.add_argument(
        "--batch_size", type=int, default=BATCH_SIZE, help="images at a time; default: %(default)s"
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add --images."""
    parser.add_argument(
        "--images", type=Path, default=None, help="a folder with captions (docs/rewards.md)"
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add where the result of an evaluation is written."""
    parser.add_argument("--output", type=Path, default=None, help="also write the result as JSON")


def check_counts(args: argparse.Namespace) -> None:
    """Raise UsageError where a count is below one."""
    for name in ("batch_size", "images_per_prompt", "images_per_task", "max_prompts"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
