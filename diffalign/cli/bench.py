"""`diffalign bench`."""

from __future__ import annotations

import argparse

from diffalign.cli import options, types
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


def add_flags(parser: Parser) -> None:
    """Add the flags of `bench`."""
    parser.add_argument("name", help="name from `diffalign list benches`")
    parser.add_argument(
        "--quick", action="store_true", help="run a small version in minutes, to see that it works"
    )
    options.add_count(parser, "--seeds", None, "number of seeds (default: 3, or 1 with --quick)")
    parser.add_argument(
        "--arms", default=None, metavar="NAME,...", help="run only these arms, separated by commas"
    )
    parser.add_argument(
        "--work",
        type=types.output_folder,
        default="runs/bench",
        metavar="DIR",
        help="folder of the runs, which are resumed (default: %(default)s)",
    )
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Run a benchmark and print its headline figures."""
    from diffalign.cli.output import emit
    from diffalign.core.checkout import require_benchmarks

    require_benchmarks()
    from benchmarks.common.record import BenchOptions, run_bench

    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 3
    work = args.work / (f"{args.name}-quick" if args.quick else args.name)
    arms = None if args.arms is None else tuple(a.strip() for a in args.arms.split(","))
    options = BenchOptions(quick=args.quick, work=work, seeds=seeds, arms=arms)
    headline = run_bench(args.name, options, output=args.output)
    for name, value in headline.items():
        print(f"{name}: {value}")
    if args.output is not None:
        print(f"result: {args.output}")
    emit(headline)


VERB = Verb(
    "bench", "run a benchmark behind one of the claims in the docs", add_flags, run, resumes=True
)
