"""`diffalign precompute`."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.cli.flags import Values
from diffalign.cli.train import add_recipe
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `precompute`."""

    recipe: str
    settings: list[str]


def run(flags: Flags) -> None:
    """Fill the cache of a recipe, and print its counts."""
    from diffalign.cli.output import emit, suggest
    from diffalign.config import load
    from diffalign.core import processes
    from diffalign.training.caches import fill_cache

    cache = fill_cache(load(flags.recipe, flags.settings))
    if processes.current().is_main_process:
        counts = {k: v for k, v in cache.manifest.items() if k != "key"}
        numbers = ", ".join(f"{k} {v}" for k, v in counts.items() if isinstance(v, int | float))
        print(f"cache: {cache.folder} ({numbers})")
        suggest("train", flags.recipe, *flags.settings)
        emit({"cache": str(cache.folder), **counts})


VERB = Verb(
    "precompute",
    "encode the training images of a recipe into its cache, without training",
    add_recipe,
    run,
    description="Encode the images of a recipe that learns from preference pairs (Inversion-DPO), or that moves a "
    "model into other latents (DC-Gen).\n`train` fills the cache by itself; here several machines can share the work. "
    "Settings are overridden as with `train`.",
    shares=True,
    resumes=True,
    takes_settings=True,
    flags=Flags,
)
