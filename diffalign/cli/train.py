"""`diffalign train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.config import AnyRunConfig
    from diffalign.training.inputs import Inputs


def add_recipe(parser: Parser) -> None:
    """Add the recipe argument."""
    parser.add_argument("recipe", help="name from `diffalign list recipes`, or a YAML file")


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `train`."""

    recipe: str
    dry_run: bool
    settings: list[str]


def add_flags(parser: Parser) -> None:
    """Add the flags of `train`."""
    add_recipe(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, prompts and rewards, print the whole configuration, and stop",
    )


def run(flags: Flags) -> None:
    """Check a recipe before torch is imported, then print its settings or train it."""
    from diffalign import config as configuration
    from diffalign.core.files import check_target
    from diffalign.pipelines import registry as models
    from diffalign.rewards import registry as rewards

    config = configuration.load(flags.recipe, flags.settings)
    for name in config.rewards:
        rewards.check_name(name)
    for name in config.evaluation.rewards:
        rewards.check_name(name, setting="evaluation.rewards")
    models.resolve(config.model.name)
    check_target(config.output_dir)
    if flags.dry_run:
        for line in dry_run(config, flags.settings):
            print(f"# {line}")
        print(configuration.dump(config), end="")
    else:
        from diffalign.training.inputs import read_inputs
        from diffalign.training.memory_auto import kept_settings
        from diffalign.training.run_folder import RunFolder

        RunFolder(config.output_dir).check(kept_settings(config))
        train_config(config, earlier=read_inputs(config))


def dry_run(config: AnyRunConfig, settings: Sequence[str]) -> Iterator[str]:
    """Yield the memory forecast and the notices of a run, without loading weights.

    Args:
        settings: overrides of the user. A mistake in one of them is raised before the forecast, which takes time.
    """
    from diffalign.core.errors import UserError
    from diffalign.training.forecast import forecast_of
    from diffalign.training.inputs import read_inputs
    from diffalign.training.memory_auto import kept_settings
    from diffalign.training.memory_fit import describe, free_memory
    from diffalign.training.run_folder import RunFolder

    config = kept_settings(config)
    RunFolder(config.output_dir).check(config)
    notices: Sequence[str] = ()
    missing: UserError | None = None
    try:
        notices = read_inputs(config).notices
    except UserError as error:
        if error.setting and any(word.startswith(f"--{error.setting}") for word in settings):
            raise
        missing = error
    # a forecast is wanted even while the prompts that the recipe names are still to be written
    yield from describe(
        config, free_memory(), lambda c, most: forecast_of(c, processes=1, most=most)
    )
    if missing is not None:
        raise missing
    for notice in notices:
        yield f"note: {notice}"


def train_config(config: AnyRunConfig, *, earlier: Inputs | None = None) -> None:
    """Train a configuration, and print its memory forecast, its result and the result's paths.

    Args:
        earlier: inputs of the run, if they were read before.
    """
    from diffalign.cli.output import emit, print_summary
    from diffalign.core import processes
    from diffalign.training.forecast import forecast_of
    from diffalign.training.memory_auto import kept_settings, settled
    from diffalign.training.memory_fit import free_memory
    from diffalign.training.memory_fit import summary as memory_line
    from diffalign.training.run import run as train
    from diffalign.training.run_folder import RunFolder

    folder = RunFolder(config.output_dir)
    main = processes.current().is_main_process
    count = processes.current().num_processes
    # a folder in use, or of another configuration, is refused before the forecast, which takes time
    with processes.hold(folder.path):
        folder.check(kept_settings(config))
        config = settled(config)
        if main:
            rooms = free_memory(processes=count)
            line = memory_line(
                config, rooms, lambda c, most: forecast_of(c, processes=count, most=most)
            )
            if line is not None:
                print(line)
        summary = train(config, earlier=earlier, choose_memory=False)
    if main:
        print_summary(summary)
        for line in results_of(config, summary):
            print(line)
        emit({k: v for k, v in summary.items() if k != "config"})


def results_of(config: AnyRunConfig, summary: Mapping[str, Any]) -> list[str]:
    """Return lines with the paths of a run's results and a suggested next command.

    Args:
        config: settings of the run.
        summary: content of the run's `summary.json`.
    """
    from diffalign.data.prompts import is_file, load_prompts
    from diffalign.evaluation.report import best_told, earlier_best, usage
    from diffalign.training.run_folder import REPORT, RunFolder

    folder = RunFolder(config.output_dir)
    lora, pipeline, scheduler = (folder.path / n for n in ("lora", "pipeline", "scheduler"))
    best = earlier_best(summary)
    places = {
        "LoRA": lora,
        **({"best LoRA": folder.best / "lora"} if best else {}),
        "pipeline": pipeline,
        "scheduler": scheduler,
        "checkpoint": folder.newest_checkpoint or folder.checkpoints,
        "report": folder.path / REPORT,
    }
    lines = [f"{name:<10}  {place}" for name, place in places.items() if place.exists()]
    held_out = config.prompts.evaluation
    # runs on pairs and images have no prompts to train on
    train = getattr(config.prompts, "train", held_out)
    if is_file(train) and not is_file(held_out):
        lines.append(
            f"note: trained on {train}, evaluated on prompts.evaluation={held_out}; "
            "name a file of held-out prompts there to evaluate on prompts like yours"
        )
    if sentence := best_told(summary):
        lines.append(sentence)
    prompt = load_prompts(held_out, limit=1)[0].text
    return [*lines, f"next: {usage(folder.path, config, prompt, best=best)[0]}"]


VERB = Verb(
    "train",
    "train a model by a recipe, with any setting changed",
    add_flags,
    run,
    description="Train a recipe from `diffalign list recipes`, or a YAML file. Every setting can be overridden with "
    "--key.sub=value.\nMany flags of diffusers' training scripts work, too, such as --learning_rate and --rank. The "
    "same command resumes an interrupted run.",
    epilog="""examples:
  diffalign train awm-shapes-sd3 --output_dir runs/mine
  diffalign train awm-shapes-sd3 --optimizer.learning_rate=1e-3 --lora.rank=8
  diffalign train mine.yaml --dry-run""",
    shares=True,
    resumes=True,
    takes_settings=True,
    flags=Flags,
)
