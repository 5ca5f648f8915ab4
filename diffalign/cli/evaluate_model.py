"""`diffalign evaluate model`, which `diffalign evaluate` stands for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli import options, types
from diffalign.cli.flags import SampleFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.data.prompts import Prompt
    from diffalign.evaluation.score import Evaluation
    from diffalign.rewards.composition import CompositeReward


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `evaluate model`."""

    run: Path | None
    rewards: list[str]
    output: Path | None
    images: Path | None


def add_flags(parser: Parser) -> None:
    """Add the flags of `evaluate model`."""
    parser.add_argument(
        "--run",
        type=types.input_folder,
        default=None,
        metavar="DIR",
        help="evaluate the policy of a run folder as the run did: its model, prompts, rewards, steps, guidance, "
        "sizes and seeds",
    )
    options.add_prompts(parser, "shapes:held_out")
    options.add_count(parser, "--max_prompts", None, "use only the first N prompts")
    options.add_rewards(parser)
    options.add_count(parser, "--images_per_prompt", 1, "images of each prompt")
    options.add_count(
        parser, "--images_per_task", None, "images of each task, instead of --images_per_prompt"
    )
    options.add_output(parser)
    # accepted only so that the error can point to `evaluate rewards`
    parser.add_argument("--images", type=types.path, default=None, help=argparse.SUPPRESS)
    options.add_model(parser)
    options.add_drawing(parser)


def run(flags: Flags) -> None:
    """Generate images of prompts, score them, and print the scores."""
    from diffalign.cli.models import recorded, settle_drawing
    from diffalign.cli.output import print_evaluation, write_result
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.core.versions import versions
    from diffalign.data.prompts import load_prompts

    if flags.images is not None:
        raise UsageError("meant `diffalign evaluate rewards --images ...`?", setting="images")
    if flags.run is not None:
        _repeat(flags.run, flags)
        return
    settle_drawing(flags)
    _note_other_drawing(flags)
    prompts = load_prompts(flags.prompts, limit=flags.max_prompts)
    reward = load_rewards(flags.rewards, [p.metadata for p in prompts])
    scores = _score(flags, prompts, reward)
    result = {
        **recorded(flags),
        "images_per_task": flags.images_per_task,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        **scores.to_dict(),
        "versions": versions(),
    }
    print_evaluation(f"{flags.model}{' + ' + flags.lora if flags.lora else ''}", result)
    write_result(flags.output, result)


def _note_other_drawing(flags: Flags) -> None:
    """Print a note if the LoRA's run drew its images in another way."""
    from diffalign.cli.models import drawing
    from diffalign.training.rerun import drawn_otherwise, read_config, run_of

    folder = run_of(flags.lora)
    if folder is None:
        return
    others = drawn_otherwise(read_config(folder), drawing(flags), flags.prompts)
    if others:
        print(
            f"note: the run in {folder} drew its images in another way ({'; '.join(others)}); "
            f"`diffalign evaluate --run {folder}` draws as the run did"
        )


def _score(flags: Flags, prompts: list[Prompt], reward: CompositeReward) -> Evaluation:
    """Generate images of the prompts and score them, with a progress bar."""
    from diffalign.cli.models import drawing, load
    from diffalign.core import console
    from diffalign.evaluation.score import evaluate_model, repeat_prompts

    settings = drawing(flags)
    total = len(repeat_prompts(prompts, settings))
    model = load(flags)
    with console.counting("images") as progress:
        progress(0, total)
        return evaluate_model(
            model,
            prompts,
            reward.score,
            settings,
            on_images=lambda part, images: progress(part.stop, total),
        )


def _repeat(folder: Path, flags: Flags) -> None:
    """Evaluate the policy of --run with the run's settings, and print the run's own score."""
    import torch

    from diffalign.cli.output import print_evaluation, write_result
    from diffalign.evaluation.figures import number
    from diffalign.training.rerun import FinishedRun

    _check_alone(flags)
    finished = FinishedRun.read(folder)
    scores = finished.evaluate("cuda" if torch.cuda.is_available() else "cpu")
    result = finished.result(scores)
    print_evaluation(f"{folder}, drawn as the run did", result)
    name, part = ("overall", "tasks") if scores.tasks else ("reward", "means")
    if name in result["of_the_run"][part]:
        print(f"{name} as the run measured it: {number(result['of_the_run'][part][name])}")
    write_result(flags.output, result)


def _check_alone(flags: Flags) -> None:
    """Raise UsageError for flags beside --run that would draw in another way."""
    from diffalign.core.errors import UsageError

    parser = Parser(add_help=False)
    add_flags(parser)
    conflicts = [
        f"`{name}`"
        for name, default in vars(parser.parse_args([])).items()
        if name not in ("run", "output") and getattr(flags, name, default) != default
    ]
    if conflicts:
        raise UsageError(
            f"draws with the settings of the run in {flags.run}; leave out {', '.join(conflicts)}, or name the LoRA "
            "with `lora` instead",
            setting="run",
        )


VERB = Verb(
    "model", "draw images of prompts with a model and score them", add_flags, run, flags=Flags
)
