"""`diffalign precompute`."""

from __future__ import annotations

import argparse
import json

from diffalign.cli.train import add_recipe
from diffalign.cli.verb import Verb


def run(args: argparse.Namespace) -> None:
    """Fill the cache of a recipe, and print what is in it."""
    from diffalign.config import load
    from diffalign.core import processes
    from diffalign.training.caches import fill_cache

    cache = fill_cache(load(args.recipe, args.settings))
    if processes.current().is_main_process:
        counts = {k: v for k, v in cache.manifest.items() if k != "key"}
        print(json.dumps({"cache": str(cache.folder), **counts}))


VERB = Verb(
    "precompute",
    "encode the images of a recipe once: preference pairs, or those of a move",
    add_recipe,
    run,
    description="Fill the cache of a recipe that learns from preference pairs or moves a model into other latents. "
    "`train` does so, too; here alone it can be shared among machines or be kept. Settings are overridden as with "
    "`train`.",
    shares=True,
    resumes=True,
    takes_settings=True,
)
