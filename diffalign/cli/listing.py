"""`diffalign list`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is listed."""
    parser.add_argument("what", choices=("recipes", "rewards", "models", "benches"))


def run(args: argparse.Namespace) -> None:
    """Print recipes, rewards, models or benches, one per line."""
    rows = _rows(args.what)
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")


def _rows(what: str) -> Mapping[str, str]:
    if what == "recipes":
        from diffalign.config import describe_recipes

        return describe_recipes()
    if what == "rewards":
        from diffalign.rewards.registry import SUMMARIES, available

        return {name: SUMMARIES.get(name, target) for name, target in available().items()}
    if what == "benches":
        from diffalign.core.checkout import require_benchmarks

        require_benchmarks()
        from benchmarks import BENCHES

        return BENCHES
    from diffalign.pipelines.registry import available as models

    return {name: spec.description for name, spec in models().items()}


VERB = Verb("list", "what there is by name", add_flags, run)
