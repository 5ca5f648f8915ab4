"""`diffalign generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `generate`."""
    parser.add_argument("prompts", nargs="+", help="texts, or files ending in .txt or .jsonl")
    parser.add_argument("--output_dir", default="runs/images", help="default: %(default)s")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="default: %(default)s")
    options.add_model(parser)
    options.add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """Write every image as PNG, and a grid."""
    from diffalign.cli.models import batching, evaluation, load, settle_drawing
    from diffalign.data.prompts import read_arguments
    from diffalign.evaluation.images import GRID, write_images

    prompts = read_arguments(args.prompts)
    settle_drawing(args)
    folder = Path(args.output_dir)
    count = write_images(load(args), prompts, folder, evaluation(args), **batching(args))
    print(f"{count} images in {folder}, all of them in {folder / GRID}")


VERB = Verb("generate", "make images with a model and a LoRA", add_flags, run)
