"""`diffalign evaluate report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options, types
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `evaluate report`."""

    folders: list[tuple[str, Path]] | None
    output: Path | None
    rewards: list[str] | None
    batch_size: int


def add_flags(parser: Parser) -> None:
    """Add the flags of `evaluate report`."""
    parser.add_argument(
        "--folders",
        type=types.named_folder,
        nargs="+",
        default=None,
        metavar="[NAME=]DIR",
        help="folders of images to show side by side",
    )
    parser.add_argument(
        "--output", type=types.output_file, default=None, metavar="FILE", help="page (.html)"
    )
    options.add_rewards(parser, None)
    options.add_batch_size(parser)


def run(flags: Flags) -> None:
    """Write a page that compares folders of images, scored first if --rewards is set."""
    from diffalign.cli.output import emit
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.comparison import write_comparison
    from diffalign.evaluation.sides import read_sides

    if not flags.folders or flags.output is None:
        raise UsageError("evaluate report needs --folders [NAME=]DIR ... and --output PAGE.html")
    reward = load_rewards(flags.rewards, []) if flags.rewards else None
    sides = read_sides(flags.folders, reward, batch_size=flags.batch_size)
    comparison = write_comparison(flags.output, sides)
    print(f"report: {flags.output} ({', '.join(s.name for s in sides)})")
    emit({**comparison, "counts": {s.name: s.counts for s in sides}})


VERB = Verb("report", "write a page that compares folders of images", add_flags, run, flags=Flags)
