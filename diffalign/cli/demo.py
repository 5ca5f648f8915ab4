"""`diffalign demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `demo`."""
    parser.add_argument("--output_dir", default="runs/demo", help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Train the recipe `demo`. A finished demo is kept aside, an interrupted one goes on."""
    from diffalign.cli.train import train_config
    from diffalign.config import load
    from diffalign.training.run_folder import set_aside

    folder = Path(args.output_dir)
    kept = set_aside(folder)
    if kept is not None:
        print(f"kept the previous demo as {kept}")
    train_config(load("demo", [f"--output_dir={folder}"]))


VERB = Verb(
    "demo",
    "watch a small model learn to follow prompts, on a laptop",
    add_flags,
    run,
    shares=True,
    resumes=True,
)
