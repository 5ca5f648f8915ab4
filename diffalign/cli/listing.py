"""`diffalign list`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

NEEDS_CUDA = "(CUDA)"
"""Ending of the description of a recipe that needs a GPU."""


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `list`."""

    what: str


def add_flags(parser: Parser) -> None:
    """Add the argument that selects the list."""
    parser.add_argument(
        "what",
        choices=("recipes", "rewards", "models", "presets", "benchmarks", "benches"),
        help="recipes of `train`, rewards, models, presets of `accelerate`, benchmarks of `evaluate suite`, or "
        "programs of `bench`",
    )


def run(flags: Flags) -> None:
    """Print one of the lists, an entry per line."""
    from diffalign.cli.output import emit

    groups = _recipes() if flags.what == "recipes" else {"": _rows(flags.what)}
    width = max((len(name) for rows in groups.values() for name in rows), default=0)
    for number, (title, rows) in enumerate(groups.items()):
        if title:
            print(f"{chr(10) if number else ''}{title}")
        for name, text in rows.items():
            print(f"{'  ' if title else ''}{name:<{width}}  {text}")
    emit({name: text for rows in groups.values() for name, text in rows.items()})


def _recipes() -> Mapping[str, Mapping[str, str]]:
    """Return recipes grouped by method and hardware; groups for a laptop come first."""
    from diffalign.composition import recipe
    from diffalign.config import describe_recipes, load
    from diffalign.config.methods import available

    methods = available()
    groups: dict[tuple[bool, int], dict[str, str]] = {}
    for name, text in describe_recipes().items():
        method = list(methods).index(load(name).algorithm.type)
        cuda = text.endswith(NEEDS_CUDA)
        groups.setdefault((cuda, method), {})[name] = text.removesuffix(NEEDS_CUDA).strip()
    titles = [method.title for method in methods.values()]
    return {
        **{
            f"{titles[method]}, {'one GPU or more' if cuda else 'a laptop or one GPU'}": groups[
                cuda, method
            ]
            for cuda, method in sorted(groups)
        },
        "All on one model (diffalign compose)": recipe.describe_recipes(),
    }


def _rows(what: str) -> Mapping[str, str]:
    if what == "rewards":
        from diffalign.rewards.registry import SUMMARIES, available

        return {name: SUMMARIES.get(name, target) for name, target in available().items()}
    if what == "benchmarks":
        from diffalign.evaluation.suite.registry import available as benchmarks
        from diffalign.evaluation.suite.registry import benchmark

        return {name: benchmark(name).summary for name in benchmarks()}
    if what == "presets":
        from diffalign.acceleration.choices import DEVICES, choices
        from diffalign.core.checkout import read_result

        record = read_result("acceleration")
        return {
            f"{choice.family} {choice.preset}": "; ".join(
                (
                    *(f"{device}: {choice.text(device)}" for device in DEVICES),
                    f"measured: {choice.measured(record)}",
                )
            )
            for choice in choices()
        }
    if what == "benches":
        from diffalign.core.checkout import require_benchmarks

        require_benchmarks()
        from benchmarks import BENCHES

        benches: Mapping[str, str] = BENCHES
        return benches
    from diffalign.pipelines.registry import available as models

    return {name: spec.description for name, spec in models().items()}


VERB = Verb(
    "list",
    "list recipes, rewards, models, presets or benchmarks by name",
    add_flags,
    run,
    flags=Flags,
)
