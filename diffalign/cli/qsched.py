"""`diffalign qsched`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli import options, types
from diffalign.cli.flags import SampleFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.data.prompts import Prompt
    from diffalign.pipelines.base import TextToImageModel
    from diffalign.rewards.composition import CompositeReward
    from diffalign.tuning.tune import Settings, TuneResult

ENGINES = ("cma", "coordinate", "ramp", "grid", "none")


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `qsched`."""

    objective: str
    reference: str | None
    engine: str
    budget: int
    box: tuple[float, float]
    penalty: float
    held_out: float
    output_dir: Path | None
    work: Path
    plot: Path | None


def add_flags(parser: Parser) -> None:
    """Add the flags of `qsched`."""
    options.add_calibration(parser, 50, required=True)
    options.add_count(parser, "--images_per_prompt", 1, "images of each prompt")
    _add_search(parser)
    parser.add_argument(
        "--output_dir",
        type=types.path,
        default=None,
        metavar="DIR",
        help="new folder for a copy of the model (default: write into the folder of --model)",
    )
    parser.add_argument(
        "--work",
        type=types.output_folder,
        default="runs/qsched",
        metavar="DIR",
        help="folder where scores are kept, so that the search can be resumed (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=types.output_file,
        default=None,
        metavar="FILE",
        help="draw the search as a picture (.png, .svg or .pdf)",
    )
    options.add_whole_model(
        parser, "factors belong to one set of weights; `diffalign merge` makes it one"
    )


def _add_search(parser: Parser) -> None:
    """Add the flags of the search."""
    parser.add_argument(
        "--objective",
        default="jaq",
        help="reward that is raised: jaq (CLIPScore + 2 HPSv2.1), jaq-lcm (CLIPScore + 2 CLIP-IQA), jaq-shapes, or "
        "reward=weight,... (default: %(default)s)",
    )
    parser.add_argument(
        "--reference",
        type=types.model,
        default=None,
        help="model before quantisation; its closed form is where the search begins, if it is better",
    )
    parser.add_argument(
        "--engine",
        default="cma",
        choices=ENGINES,
        help="search method; none takes the closed form as it is (default: %(default)s)",
    )
    options.add_count(parser, "--budget", 200, "candidates that are drawn and scored")
    parser.add_argument(
        "--box",
        type=float,
        nargs=2,
        default=(0.8, 1.2),
        metavar=("LOW", "HIGH"),
        help="range of the factors (default: 0.8 1.2)",
    )
    parser.add_argument(
        "--penalty",
        type=types.number(0),
        default=0.0,
        metavar="WEIGHT",
        help="weight of the squared distance of the factors from 1 (default: %(default)s)",
    )
    options.add_held_out(parser)


def run(flags: Flags) -> None:
    """Search the factors, print them, and write them into the model or a copy."""
    from diffalign.cli.models import chosen_prompts, load, settle_drawing
    from diffalign.cli.output import emit, suggest
    from diffalign.rewards.composition import CompositeReward
    from diffalign.tuning.saving import describe, keeps_earlier, save, target_folder

    folder, whole = target_folder(flags.model, flags.output_dir)
    settings = _settings(flags)
    reward = CompositeReward.from_config(settings.objective, setting="objective")
    prompts = chosen_prompts(flags)
    card = settle_drawing(flags)
    reward.check_metadata([p.metadata for p in prompts])
    reward.prepare()
    model = load(flags)
    result = _tune(flags, settings, model, prompts, reward)
    result.apply(model.pipeline)
    save(model.pipeline, result, folder, whole=whole, card=card)
    _plot(flags.plot, result)
    print(describe(result, folder, keeps_earlier=keeps_earlier(result, model.pipeline)))
    suggest("generate", "a photo of a red circle", "--model", folder)
    emit({k: v for k, v in result.to_dict().items() if k != "history"})


def _settings(flags: Flags) -> Settings:
    """Return the settings of the search, checked before anything is loaded."""
    from diffalign.core.errors import UsageError
    from diffalign.tuning.objective import parse
    from diffalign.tuning.plot import check_plot
    from diffalign.tuning.tune import Settings

    if flags.plot is not None:
        check_plot(flags.plot)
    if flags.engine == "none" and flags.reference is None:
        raise UsageError(
            "none is the closed form alone, which needs a `reference`", setting="engine"
        )
    return Settings(
        parse(flags.objective),
        engine=flags.engine,
        budget=flags.budget,
        low=flags.box[0],
        high=flags.box[1],
        penalty=flags.penalty,
        held_out=flags.held_out,
        seed=flags.seed,
    )


def _tune(
    flags: Flags,
    settings: Settings,
    model: TextToImageModel,
    prompts: list[Prompt],
    reward: CompositeReward,
) -> TuneResult:
    """Search the factors, or continue the search in --work."""
    from diffalign.cli.models import drawing, load_reference
    from diffalign.tuning.tune import tune

    return tune(
        model,
        prompts,
        reward.score,
        settings,
        drawing(flags),
        reference=load_reference(flags.reference, flags, model),
        file=flags.work / "scores.jsonl",
    )


def _plot(file: Path | None, result: TuneResult) -> None:
    """Draw the search as a picture, if --plot is set."""
    from diffalign.tuning.plot import plot_history

    if file is not None:
        plot_history(result, file)
        print(f"plot: {file}")


VERB = Verb(
    "qsched",
    "repair a quantised few-step model by tuning its schedule",
    add_flags,
    run,
    description="Search two factors per step of the scheduler (Q-Sched) that raise a reward, and write them into the "
    "scheduler's\nconfiguration if held-out prompts agree (docs/qsched.md). The same command resumes.",
    resumes=True,
    flags=Flags,
)
