"""`diffalign evaluate wins`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options, types
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `evaluate wins`."""

    images: Path | None
    against: Path | None
    rewards: list[str]
    output: Path | None
    batch_size: int


def add_flags(parser: Parser) -> None:
    """Add the flags of `evaluate wins`."""
    options.add_images(parser)
    parser.add_argument(
        "--against",
        type=types.input_folder,
        default=None,
        metavar="DIR",
        help="the other folder, with images of the same names",
    )
    options.add_rewards(parser)
    options.add_output(parser)
    options.add_batch_size(parser)


def run(flags: Flags) -> None:
    """Count how often images of --images are preferred to their namesakes in --against."""
    from diffalign.cli.output import print_win_rates, write_result
    from diffalign.cli.rewards import load_rewards
    from diffalign.core import console
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.wins import compare_folders

    if flags.images is None or flags.against is None:
        raise UsageError("evaluate wins needs --images DIR and --against DIR")
    with console.counting("scores") as progress:
        result, error = compare_folders(
            flags.images,
            flags.against,
            lambda metadata: load_rewards(flags.rewards, metadata),
            batch_size=flags.batch_size,
            progress=progress,
        )
    rates = {n: rate for n, rate in result["win_rate"].items() if rate}
    print_win_rates(f"{flags.images} against {flags.against}", rates)
    write_result(flags.output, result)
    if not rates:
        raise UsageError(f"no pair could be scored: {error or 'all rewards are NaN'}")


VERB = Verb(
    "wins",
    "count how often a folder's images are preferred to another's",
    add_flags,
    run,
    flags=Flags,
)
