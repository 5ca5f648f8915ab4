"""`diffalign bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options, types
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `bench`."""

    name: str
    quick: bool
    seeds: int | None
    arms: str | None
    work: Path
    output: Path | None


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


def run(flags: Flags) -> None:
    """Run a benchmark and print its headline figures."""
    from diffalign.cli.output import emit
    from diffalign.core.checkout import require_benchmarks

    require_benchmarks()
    from benchmarks.common.record import BenchOptions, run_bench

    seeds = flags.seeds if flags.seeds is not None else 1 if flags.quick else 3
    work = flags.work / (f"{flags.name}-quick" if flags.quick else flags.name)
    arms = None if flags.arms is None else tuple(a.strip() for a in flags.arms.split(","))
    options = BenchOptions(quick=flags.quick, work=work, seeds=seeds, arms=arms)
    headline = run_bench(flags.name, options, output=flags.output)
    for name, value in headline.items():
        print(f"{name}: {value}")
    if flags.output is not None:
        print(f"result: {flags.output}")
    emit(headline)


VERB = Verb(
    "bench",
    "run a benchmark behind one of the claims in the docs",
    add_flags,
    run,
    resumes=True,
    flags=Flags,
)
