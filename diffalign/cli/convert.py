"""`diffalign convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `convert`."""
    parser.add_argument("lora", help="file, folder or hub id; behind a colon the file in it")
    parser.add_argument("--to", required=True, choices=("diffusers", "comfyui", "kohya"))
    parser.add_argument(
        "--family",
        default=None,
        choices=("sd3", "flux"),
        help="needed for a transformer in kohya's keys",
    )
    parser.add_argument("--output", type=Path, required=True)


def run(args: argparse.Namespace) -> None:
    """Rewrite a LoRA file."""
    from diffalign.core.files import aside
    from diffalign.lora.files import read_lora
    from diffalign.lora.formats import write

    lora = read_lora(args.lora)
    with aside(args.output) as file:
        write(lora, file, to=args.to, family=args.family)
    print(f"{args.output}: {len(lora)} modules in {args.to}'s keys")


VERB = Verb("convert", "a LoRA file from and to the keys of other programs", add_flags, run)
