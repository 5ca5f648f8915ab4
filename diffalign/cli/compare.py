"""`diffalign evaluate wins` and `evaluate report`: comparison of image folders."""

from __future__ import annotations

import argparse

from diffalign.cli import options, types
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


def add_wins(parser: Parser) -> None:
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


def run_wins(args: argparse.Namespace) -> None:
    """Count how often images of --images are preferred to their namesakes in --against."""
    from diffalign.cli.output import print_win_rates, write_result
    from diffalign.cli.rewards import load_rewards
    from diffalign.core import console
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.wins import compare_folders

    if args.images is None or args.against is None:
        raise UsageError("evaluate wins needs --images DIR and --against DIR")
    with console.counting("scores") as progress:
        result, error = compare_folders(
            args.images,
            args.against,
            lambda metadata: load_rewards(args.rewards, metadata),
            batch_size=args.batch_size,
            progress=progress,
        )
    rates = {n: rate for n, rate in result["win_rate"].items() if rate}
    print_win_rates(f"{args.images} against {args.against}", rates)
    write_result(args.output, result)
    if not rates:
        raise UsageError(f"no pair could be scored: {error or 'all rewards are NaN'}")


def add_report(parser: Parser) -> None:
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


def run_report(args: argparse.Namespace) -> None:
    """Write a page that compares folders of images, scored first if --rewards is set."""
    from diffalign.cli.output import emit
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.comparison import write_comparison
    from diffalign.evaluation.sides import read_sides

    if not args.folders or args.output is None:
        raise UsageError("evaluate report needs --folders [NAME=]DIR ... and --output PAGE.html")
    reward = load_rewards(args.rewards, []) if args.rewards else None
    sides = read_sides(args.folders, reward, batch_size=args.batch_size)
    comparison = write_comparison(args.output, sides)
    print(f"report: {args.output} ({', '.join(s.name for s in sides)})")
    emit({**comparison, "counts": {s.name: s.counts for s in sides}})


WINS = Verb(
    "wins", "count how often a folder's images are preferred to another's", add_wins, run_wins
)
REPORT = Verb("report", "write a page that compares folders of images", add_report, run_report)
