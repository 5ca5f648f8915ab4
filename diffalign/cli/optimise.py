"""`diffalign optimise`."""

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
    from diffalign.optimisation.run import Optimised, Settings
    from diffalign.rewards.composition import CompositeReward

AXES = ("steps", "cache", "guidance", "quantize", "attention", "compile", "vae", "offload")


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `optimise`."""

    budget: str | None
    quality: str
    options: list[str]
    minutes: float
    held_out: float
    search_images: int
    images_per_call: int
    output_dir: Path


def add_flags(parser: Parser) -> None:
    """Add the flags of `optimise`."""
    options.add_calibration(parser, 200, required=True)
    options.add_count(parser, "--images_per_prompt", 1, "held-out images of each prompt")
    options.add_count(
        parser, "--images_per_task", None, "images of each task, instead of --images_per_prompt"
    )
    _add_search(parser)
    options.add_output_dir(
        parser,
        "runs/fast",
        "folder of the plan and the measurements; the same command goes on",
    )
    options.add_model(parser)
    options.add_drawing(parser, solver=False)


def _add_search(parser: Parser) -> None:
    """Add the flags of the search."""
    parser.add_argument(
        "--budget",
        default=None,
        metavar="LIMITS",
        help="latency of one call, and peak memory, such as 'latency<1.5s,memory<16GiB' (default: as fast as the "
        "quality allows)",
    )
    parser.add_argument(
        "--quality",
        default="psnr>=30",
        metavar="LIMITS",
        help="least mean PSNR to the plain images in dB, and least differences of rewards or of geneval to them, "
        "such as 'psnr>=30,clip_score>=-0.005' (default: %(default)s)",
    )
    parser.add_argument(
        "--options",
        type=types.names,
        default=",".join(AXES),
        metavar="NAME,...",
        help="options to try (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=types.number(above=0),
        default=10.0,
        metavar="N",
        help="time of all measurements; half of it for the search, the rest for held-out prompts "
        "(default: %(default)s)",
    )
    options.add_held_out(parser)
    options.add_count(parser, "--search_images", 24, "images that each point of the search draws")
    options.add_count(
        parser, "--images_per_call", 1, "images of the call whose seconds are the latency"
    )


def run(flags: Flags) -> None:
    """Search a plan, write it with its page, and print the front."""
    from diffalign.cli.models import chosen_prompts, settle_drawing
    from diffalign.cli.output import emit, print_table, suggest
    from diffalign.optimisation import saving

    settings = _settings(flags)
    prompts = chosen_prompts(flags)
    reward = _reward(settings, prompts)
    settle_drawing(flags)
    result = _optimise(flags, settings, prompts, reward)
    record = saving.write(result, flags.output_dir, model=flags.model)
    print_table("front of time and quality", *saving.table(result))
    print(f"page: {flags.output_dir / saving.PAGE}, figures: {flags.output_dir / saving.RESULT}")
    emit(record)
    if result.choice is None:
        raise saving.not_reached(result)
    print(saving.verdict(result))
    for line in saving.usage(result, flags.output_dir, model=flags.model):
        print(f"    {line}")
    steps = result.choice.candidate.steps
    if steps != result.call.steps:
        suggest("evaluate", "--model", flags.model, "--num_inference_steps", steps)


def _settings(flags: Flags) -> Settings:
    """Return the settings of the search, checked before anything is loaded."""
    from diffalign.optimisation.candidates import check_axes
    from diffalign.optimisation.limits import Limits
    from diffalign.optimisation.run import Settings

    return Settings(
        Limits.parse(flags.budget, flags.quality),
        check_axes(flags.options),
        flags.minutes,
        flags.held_out,
        flags.search_images,
        flags.images_per_call,
    )


def _reward(settings: Settings, prompts: list[Prompt]) -> CompositeReward:
    """Return the rewards that have limits, ready to score."""
    from diffalign.optimisation.limits import GENEVAL
    from diffalign.rewards.composition import CompositeReward
    from diffalign.rewards.detection import choose_detector

    names = [n for n in settings.limits.differences if n != GENEVAL]
    reward = CompositeReward.from_config(dict.fromkeys(names, 1.0), setting="quality")
    metadata = [p.metadata for p in prompts]
    if GENEVAL in settings.limits.differences:
        detector = choose_detector(None, metadata)
        reward = CompositeReward(
            {**reward.rewards, detector.card.name: detector},
            {**reward.weights, detector.card.name: 1.0},
        )
    reward.check_metadata(metadata)
    reward.prepare()
    return reward


def _optimise(
    flags: Flags, settings: Settings, prompts: list[Prompt], reward: CompositeReward
) -> Optimised:
    """Load the model and search, with a line for each point."""
    from diffalign.cli.models import drawing, load
    from diffalign.core import console
    from diffalign.optimisation.run import optimise, parts_of

    # too few prompts are refused before the model is loaded
    parts_of(prompts, settings, drawing(flags))
    model = load(flags)
    model.pipeline.set_progress_bar_config(disable=True)
    return optimise(
        model,
        prompts,
        reward.score,
        settings,
        drawing(flags),
        flags.output_dir,
        say=console.say,
    )


VERB = Verb(
    "optimise",
    "search the fastest acceleration of a model that keeps its images",
    add_flags,
    run,
    description="Measure the options of `diffalign.accelerate` on this machine, alone and together, beside the plain "
    "pipeline.\nKeep what a paired bootstrap accepts on held-out prompts, draw the front, and write a plan "
    "(docs/acceleration.md).\nThe same command goes on. Ends with exit code 1 if no point keeps the limits.",
    epilog="""example:
  diffalign optimise --model shapes-sd3 --prompts shapes:train --num_inference_steps 28 --quality 'psnr>=30'""",
    resumes=True,
    flags=Flags,
)
