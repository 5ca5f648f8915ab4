"""`diffalign evaluate wins` and `evaluate report`: folders of images beside each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.verb import Verb


def add_wins(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evaluate wins`."""
    options.add_images(parser)
    parser.add_argument("--against", type=Path, default=None, help="the other folder")
    parser.add_argument(
        "--rewards", default="verifier", help="comma-separated; default: %(default)s"
    )
    options.add_evaluation(parser)
    options.add_batch_size(parser)


def run_wins(args: argparse.Namespace) -> None:
    """How often the images of --images are preferred to those of the same name in --against."""
    from diffalign.cli.output import print_win_rates, write_result
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.wins import compare_folders

    options.check_counts(args)
    if args.images is None or args.against is None:
        raise UsageError("evaluate wins needs --images DIR and --against DIR")
    result, error = compare_folders(
        args.images,
        args.against,
        lambda metadata: load_rewards(args.rewards, metadata),
        batch_size=args.batch_size,
    )
    rates = {n: rate for n, rate in result["win_rate"].items() if rate}
    print_win_rates(f"{args.images} against {args.against}", rates)
    write_result(args.output, result)
    print(json.dumps(result))
    if not rates:
        raise UsageError(f"no pair could be scored: {error or 'all rewards are NaN'}")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evaluate report`."""
    parser.add_argument("--folders", nargs="+", default=None, metavar="[NAME=]DIR")
    parser.add_argument("--output", type=Path, default=None, help="the page")
    parser.add_argument("--rewards", default=None, help="comma-separated; default: none")
    options.add_batch_size(parser)


def run_report(args: argparse.Namespace) -> None:
    """A page that compares the folders of --folders; with --rewards their images are scored first."""
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.comparison import write_comparison
    from diffalign.evaluation.sides import read_sides

    options.check_counts(args)
    if not args.folders or args.output is None:
        raise UsageError("evaluate report needs --folders [NAME=]DIR ... and --output PAGE.html")
    reward = load_rewards(args.rewards, []) if args.rewards else None
    sides = read_sides(args.folders, reward, batch_size=args.batch_size)
    comparison = write_comparison(args.output, sides)
    print(json.dumps({**comparison, "counts": {s.name: s.counts for s in sides}}))


WINS = Verb("wins", "how often a folder's images are preferred to another's", add_wins, run_wins)
REPORT = Verb("report", "a page that compares folders of images", add_report, run_report)
