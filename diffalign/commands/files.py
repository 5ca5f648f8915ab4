"""The verbs on LoRA files: convert, merge."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.commands.images import load
from diffalign.errors import UsageError
from diffalign.lora import WEIGHT_NAME
from diffalign.lora_formats import read, write


def convert(args: argparse.Namespace) -> int:
    """Rewrite a LoRA file."""
    source = Path(args.lora)
    found = read(source / WEIGHT_NAME if source.is_dir() else source)
    write(found, args.output, to=args.to, family=args.family)
    print(f"{args.output}: {len(found.down)} modules in {args.to}'s keys")
    return 0


def merge(args: argparse.Namespace) -> int:
    """Save a pipeline whose weights hold the LoRA: it loads and runs without adapters, at the base's speed."""
    if args.output_dir.exists():
        raise UsageError(f"--output_dir: {args.output_dir} exists already")
    pipeline = load(args).pipeline
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {args.model} with {args.lora} in its weights")
    return 0
