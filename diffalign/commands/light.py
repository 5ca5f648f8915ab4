"""Verbs that answer, or refuse what is misspelt, before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence


def train(recipe: str, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Load a recipe and train it; `dry_run`: only check what can be checked without a model, and print it."""
    from diffalign import config as configuration
    from diffalign.pipelines import registry as models
    from diffalign.rewards import registry as rewards

    config = configuration.load(recipe, overrides)
    for name in config.rewards:
        rewards.check_name(name)
    for name in config.evaluation.rewards:
        rewards.check_name(name, setting="evaluation.rewards")
    models.resolve(config.model.name)
    if dry_run:
        from diffalign.training.inputs import read_inputs

        read_inputs(config)
        print(configuration.dump(config), end="")
        return 0
    from diffalign.commands.training import train as run

    return run(config)


def listing(what: str) -> int:
    """Print recipes, rewards, models or benches, one a line."""
    if what == "recipes":
        from diffalign.config import describe_recipes

        rows = describe_recipes()
    elif what == "rewards":
        from diffalign.rewards.registry import SUMMARIES, available

        rows = {name: SUMMARIES.get(name, target) for name, target in available().items()}
    elif what == "benches":
        from diffalign.core.checkout import require_benchmarks

        require_benchmarks()
        from benchmarks import BENCHES

        rows = BENCHES
    else:
        from diffalign.pipelines.registry import available as models

        rows = {name: spec.description for name, spec in models().items()}
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
    return 0
