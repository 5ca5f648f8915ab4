"""`diffalign demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `demo`."""

    output_dir: Path


def add_flags(parser: Parser) -> None:
    """Add the flags of `demo`."""
    options.add_output_dir(parser, "runs/demo", "folder of the run")


def run(flags: Flags) -> None:
    """Train the recipe `demo`.

    A finished demo is renamed first; an interrupted one is resumed.
    """
    from diffalign.cli.train import train_config
    from diffalign.config import load
    from diffalign.training.run_folder import set_aside

    earlier = set_aside(flags.output_dir)
    if earlier is not None:
        print(f"the previous demo is now in {earlier}")
    train_config(load("demo", [f"--output_dir={flags.output_dir}"]))


VERB = Verb(
    "demo",
    "train a small model to follow prompts, on a laptop, in about ten minutes",
    add_flags,
    run,
    shares=True,
    resumes=True,
    flags=Flags,
)
