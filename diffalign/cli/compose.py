"""`diffalign compose`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.composition.plan import Plan


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `compose`."""

    recipe: str
    dry_run: bool
    until: str | None
    lora: str | None
    settings: list[str]


def add_flags(parser: Parser) -> None:
    """Add the flags of `compose`."""
    parser.add_argument("recipe", help="name from `diffalign list recipes`, or a YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all stages, print the forecast of memory, work, time and disk, and stop",
    )
    parser.add_argument(
        "--until",
        default=None,
        metavar="STAGE",
        help="make the stages up to this one (default: all)",
    )
    parser.add_argument(
        "--lora",
        default=None,
        help="LoRA that is merged as the alignment, instead of training one",
    )


def run(flags: Flags) -> None:
    """Check all stages, print the forecast, then make and measure the stages."""
    from diffalign.cli.output import emit, print_table, suggest
    from diffalign.composition import forecast, result
    from diffalign.composition.plan import make_plan
    from diffalign.composition.recipe import load
    from diffalign.composition.run import below_floor, check_folder, compose
    from diffalign.core import console
    from diffalign.core.files import check_target

    recipe = load(flags.recipe, [*_lora(flags.lora), *flags.settings])
    check_target(recipe.output_dir)
    plan = make_plan(recipe)
    check_folder(plan.folder)
    for line in _forecast(plan):
        print(line)
    if flags.dry_run:
        return
    forecast.check_disk(plan)
    composed = compose(plan, until=flags.until, say=console.say)
    record = result.write(composed)
    names, rows = result.short_table(composed)
    print_table(recipe.model, names, [rows])
    print(result.lead(composed))
    print(f"page: {result.page(composed)}")
    emit({**result.headline(composed), "stages": record["stages"]})
    if composed.stopped is not None:
        raise below_floor(composed)
    print(f"model: {composed.folder}")
    suggest("generate", composed.base.measured.evaluation.texts[0], "--model", composed.folder)


def _lora(place: str | None) -> list[str]:
    """Return the overrides of a recipe that merge a LoRA instead of training one."""
    if place is None:
        return []
    names = ("recipe=null", "settings={}", f"lora={place}")
    return [f"--stages.align.{name}" for name in names]


def _forecast(plan: Plan) -> Iterator[str]:
    """Print the forecast as a table, and yield lines about it."""
    from diffalign.cli.output import print_table
    from diffalign.composition import forecast

    rows = forecast.forecasts(plan)
    rate = forecast.measured_rate(plan.recipe.dtype)
    names, cells = forecast.describe(rows, rate)
    print_table("forecast", names, [cells])
    yield from forecast.notes(rows, rate, plan.folder)


VERB = Verb(
    "compose",
    "align, move, distil, quantise and repair one model, measured after every stage",
    add_flags,
    run,
    description="Run the stages of a recipe on a base: DC-Gen, alignment, few-step student, quantisation, Q-Sched and "
    "acceleration\n(docs/compose.md). Every stage is measured and stored; the same command goes on. Settings are "
    "written --stages.STAGE.NAME=VALUE.\nEnds with exit code 1 if a stage does not keep its floors.",
    epilog="""examples:
  diffalign compose compose-shapes-flux
  diffalign compose compose-shapes-flux --stages.quantize.backend=int4 --output_dir=runs/mine
  diffalign compose compose-flux.1-dev --dry-run""",
    resumes=True,
    takes_settings=True,
    flags=Flags,
)
