"""The verbs that train: train, demo, bench."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from diffalign.config import AnyRunConfig, LatentRunConfig, PreferenceRunConfig, load
from diffalign.core import processes
from diffalign.core.errors import UsageError, UserError
from diffalign.data.shard_cache import ShardCache
from diffalign.methods.dcgen.maker import precompute_latents as fill_latents
from diffalign.methods.preference.precompute import precompute as fill_cache
from diffalign.pipelines.moving import load_autoencoder, move_model
from diffalign.pipelines.registry import load_meta_model
from diffalign.training.denoise import image_size
from diffalign.training.memory import forecast
from diffalign.training.run import prepare_model, run
from diffalign.training.run_folder import SUMMARY


def train(config: AnyRunConfig) -> int:
    """Run a configuration and print what it will need and what came of it."""
    if processes.current().is_main_process:
        print_forecast(config)
    summary = run(config)
    if processes.current().is_main_process:
        print_summary(summary)
    return 0


def precompute(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Fill the cache of a recipe that learns from pairs, and say what is in it."""
    config = load(args.recipe, overrides)
    if not isinstance(config, PreferenceRunConfig | LatentRunConfig):
        raise UsageError(
            f"precompute: {config.algorithm.type} learns from no pairs and from no latents"
        )
    accelerator = processes.make_accelerator()
    model = prepare_model(config, accelerator.device)
    cache: ShardCache
    if isinstance(config, LatentRunConfig):
        cache = fill_latents(config, model, accelerator)
    else:
        cache = fill_cache(config, model, accelerator)
    if accelerator.is_main_process:
        counts = {k: v for k, v in cache.manifest.items() if k != "key"}
        print(json.dumps({"cache": str(cache.folder), **counts}))
    return 0


def print_forecast(config: AnyRunConfig) -> None:
    """The memory forecast, before anything is loaded."""
    c = config.model
    try:
        model = load_meta_model(
            c.name,
            dtype=getattr(torch, c.dtype),
            revision=c.revision,
            max_sequence_length=c.max_sequence_length,
        )
        if isinstance(config, LatentRunConfig) and config.latents.autoencoder is not None:
            vae = load_autoencoder(
                config.latents.autoencoder, dtype=getattr(torch, c.dtype), meta=True
            )
            size = image_size(config, model)
            model = move_model(model, vae, size=size, channels=config.latents.channels)
        print(forecast(model, config, processes=processes.current().num_processes))
    except (OSError, UserError):
        return  # no configuration to read, or one that cannot be run: loading it for good will say so


def demo(args: argparse.Namespace) -> int:
    """The recipe `demo`. A finished demo is kept aside, an interrupted one goes on."""
    folder = Path(args.output_dir)
    if (folder / SUMMARY).is_file():
        number = 1
        while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(kept)
        print(f"kept the previous demo as {kept}")
    return train(load("demo", [f"--output_dir={folder}"]))


def print_summary(summary: dict) -> None:
    """A table of both evaluations."""
    table = Table(title=f"held-out prompts, {summary['updates']} updates on {summary['device']}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for part in ("tasks", "means"):
        after, before = summary["after"][part], summary["before"][part]
        for name in after:
            if name in before:
                table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
        table.add_section()
    Console().print(table)
    print(f"training {summary['training_seconds']:.0f} s, in all {summary['seconds']:.0f} s")


def bench(args: argparse.Namespace) -> int:
    """Run a benchmark; the last line of the output is JSON."""
    from diffalign.core.checkout import require_benchmarks

    require_benchmarks()
    from benchmarks.common.record import BenchOptions, run_bench

    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 3
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {seeds}")
    work = args.work / (f"{args.name}-quick" if args.quick else args.name)
    arms = None if args.arms is None else tuple(a.strip() for a in args.arms.split(","))
    options = BenchOptions(quick=args.quick, work=work, seeds=seeds, arms=arms)
    print(json.dumps(run_bench(args.name, options, output=args.output)))
    return 0
