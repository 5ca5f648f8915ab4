"""`diffalign evaluate geneval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.cli import options
from diffalign.cli.flags import SampleFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `evaluate geneval`."""

    images: Path | None
    output_dir: Path
    detector: str | None
    output: Path | None


def add_flags(parser: Parser) -> None:
    """Add the flags of `evaluate geneval`."""
    options.add_images(parser, text="score this folder in GenEval's layout, and draw nothing")
    options.add_prompts(parser, None)
    options.add_count(parser, "--max_prompts", None, "use only the first N prompts")
    options.add_count(parser, "--images_per_prompt", 4, "images of each prompt")
    options.add_output_dir(
        parser, "runs/geneval", "folder of the images; the same command resumes filling it"
    )
    parser.add_argument(
        "--detector",
        default=None,
        choices=("verifier", "geneval", "geneval_compat"),
        help="detector that looks for the objects (default: the one that knows the prompts' classes)",
    )
    options.add_output(parser)
    options.add_model(parser)
    options.add_drawing(parser)


def run(flags: Flags) -> None:
    """Score a folder in GenEval's layout, and generate its missing images first.

    With --images the folder is scored as it is.
    """
    from diffalign.cli.output import print_scores, suggest, write_result
    from diffalign.core import processes
    from diffalign.core.errors import UsageError

    state = processes.current()
    folder = flags.images or flags.output_dir
    result = _score(flags, folder)
    if not state.is_main_process:
        return
    title = f"GenEval of {folder}, seen by {result['detector']['name']}"
    print_scores(title, result["tasks"], result["intervals"])
    write_result(flags.output or folder / "summary.json", result)
    if result["scored"] == 0:
        raise UsageError(
            f"no image of {folder} could be read: {result['first_error']}. Delete damaged files, and the same "
            "command draws them again"
        )
    print(f"images and scores: {folder}")
    suggest("evaluate", "report", "--folders", folder, "--output", folder / "report.html")


def _score(flags: Flags, folder: Path) -> dict[str, Any]:
    """Fill the folder unless it is one of the user's, and score it."""
    from diffalign.cli.models import made_with
    from diffalign.core import console
    from diffalign.evaluation.fill import read_made, score_filled
    from diffalign.rewards.detection import choose_detector

    if flags.images is None:
        detector = _fill(flags, folder)
        made = made_with(flags)
    else:
        detector, made = None, read_made(folder)
    with console.counting("scores") as progress:
        return score_filled(
            folder,
            lambda metadata: detector or choose_detector(flags.detector, metadata),
            made,
            batch_size=flags.batch_size or options.BATCH_SIZE,
            progress=progress,
        )


def _fill(flags: Flags, folder: Path) -> Any:
    """Generate missing images, and return the detector that knows the prompts' classes."""
    from diffalign.cli.models import fill, settle_drawing
    from diffalign.data.prompts import load_prompts
    from diffalign.rewards.detection import choose_detector

    shapes = flags.model.startswith("shapes-")
    flags.prompts = flags.prompts or ("shapes:held_out" if shapes else "geneval")
    settle_drawing(flags)
    prompts = load_prompts(flags.prompts, limit=flags.max_prompts)
    # an unknown class is an error before anything is drawn
    detector = choose_detector(flags.detector, [p.metadata for p in prompts])
    fill(flags, folder, prompts)
    return detector


VERB = Verb(
    "geneval",
    "fill a folder in GenEval's layout with a model's images, or take one, and score it",
    add_flags,
    run,
    shares=True,
    resumes=True,
    flags=Flags,
)
