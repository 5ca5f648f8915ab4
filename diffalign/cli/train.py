"""`diffalign train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.config import AnyRunConfig


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, whose settings can be overridden."""
    parser.add_argument("recipe", help="name or YAML file")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`."""
    add_recipe(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the settings, prompts and rewards, print the configuration and stop",
    )


def run(args: argparse.Namespace) -> None:
    """Check the recipe before torch is imported, then print its settings or train it."""
    from diffalign import config as configuration
    from diffalign.core.files import check_target
    from diffalign.pipelines import registry as models
    from diffalign.rewards import registry as rewards

    config = configuration.load(args.recipe, args.settings)
    for name in config.rewards:
        rewards.check_name(name)
    for name in config.evaluation.rewards:
        rewards.check_name(name, setting="evaluation.rewards")
    models.resolve(config.model.name)
    if args.dry_run:
        from diffalign.training.forecast import forecast_of
        from diffalign.training.inputs import read_inputs
        from diffalign.training.memory_fit import describe, free_memory

        try:
            notices = read_inputs(config).notices
        finally:  # what a run needs is told even where its prompts are still to be written
            for line in describe(config, free_memory(), lambda c: forecast_of(c, processes=1)):
                print(f"# {line}")
        for notice in notices:
            print(f"# note: {notice}")
        print(configuration.dump(config), end="")
    else:
        check_target(config.output_dir)
        train_config(config)


def train_config(config: AnyRunConfig) -> None:
    """Train a configuration, and print what it needs and what came of it."""
    from diffalign.cli.output import print_summary
    from diffalign.core import processes
    from diffalign.training.forecast import forecast_of
    from diffalign.training.memory_fit import free_memory
    from diffalign.training.memory_fit import summary as memory_line
    from diffalign.training.run import run as train

    main = processes.current().is_main_process
    count = processes.current().num_processes
    if main:
        rooms = free_memory(processes=count)
        line = memory_line(config, rooms, lambda c: forecast_of(c, processes=count))
        if line is not None:
            print(line)
    summary = train(config)
    if main:
        print_summary(summary)
        for line in results_of(config):
            print(line)


def results_of(config: AnyRunConfig) -> list[str]:
    """Return where the results of a finished run are, and the command to try next."""
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.report import usage
    from diffalign.training.run_folder import REPORT, RunFolder

    folder = RunFolder(config.output_dir)
    lora, pipeline, scheduler = (folder.path / n for n in ("lora", "pipeline", "scheduler"))
    places = {
        "LoRA": lora,
        "pipeline": pipeline,
        "scheduler": scheduler,
        "checkpoint": folder.newest_checkpoint or folder.checkpoints,
        "report": folder.path / REPORT,
    }
    lines = [f"{name:<10}  {place}" for name, place in places.items() if place.exists()]
    prompt = load_prompts(config.prompts.evaluation, limit=1)[0].text
    return [*lines, f"next: {usage(folder.path, config, prompt)[0]}"]


VERB = Verb(
    "train",
    "train a recipe",
    add_flags,
    run,
    description="Train a recipe of `diffalign list recipes`, or a YAML file. Every setting can be overridden: "
    "--key.sub=value. Flags of diffusers' training scripts work where they mean the same.",
    shares=True,
    resumes=True,
    takes_settings=True,
)
