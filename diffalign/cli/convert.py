"""`diffalign convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `convert`."""
    parser.add_argument("lora", help="a .safetensors file, or a folder with diffusers' file name")
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
    from diffalign.lora.files import WEIGHT_NAME
    from diffalign.lora.formats import read, write

    source = Path(args.lora)
    lora = read(source / WEIGHT_NAME if source.is_dir() else source)
    with aside(args.output) as file:
        write(lora, file, to=args.to, family=args.family)
    print(f"{args.output}: {len(lora.down)} modules in {args.to}'s keys")


VERB = Verb("convert", "a LoRA file from and to the keys of other programs", add_flags, run)
