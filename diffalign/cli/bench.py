"""`diffalign bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench`."""
    parser.add_argument("name", help="a name of `diffalign list benches`")
    parser.add_argument("--quick", action="store_true", help="minutes, to see that it works")
    parser.add_argument("--seeds", type=int, default=None, help="default: 3, or 1 with --quick")
    parser.add_argument("--arms", default=None, help="only these, separated by commas")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench"), help="runs are kept and resumed here"
    )
    parser.add_argument("--output", type=Path, default=None, help="write the whole result as JSON")


def run(args: argparse.Namespace) -> None:
    """Run a benchmark; the last line of the output is JSON."""
    from diffalign.core.checkout import require_benchmarks
    from diffalign.core.errors import UsageError

    require_benchmarks()
    from benchmarks.common.record import BenchOptions, run_bench

    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 3
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {seeds}")
    work = args.work / (f"{args.name}-quick" if args.quick else args.name)
    arms = None if args.arms is None else tuple(a.strip() for a in args.arms.split(","))
    options = BenchOptions(quick=args.quick, work=work, seeds=seeds, arms=arms)
    print(json.dumps(run_bench(args.name, options, output=args.output)))


VERB = Verb("bench", "measure one of the suite's claims", add_flags, run, resumes=True)
