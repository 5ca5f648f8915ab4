"""`diffalign evaluate geneval`."""

from __future__ import annotations

import argparse

from diffalign.cli import options
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


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


def run(args: argparse.Namespace) -> None:
    """Score a folder in GenEval's layout, and generate its missing images first.

    With --images the folder is scored as it is.
    """
    from diffalign.cli.models import fill, made_with, settle_drawing
    from diffalign.cli.output import print_scores, suggest, write_result
    from diffalign.core import console, processes
    from diffalign.core.errors import UsageError
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.fill import read_made, score_filled
    from diffalign.rewards.detection import choose_detector

    state = processes.current()
    folder, detector = args.images or args.output_dir, None
    if args.images is None:
        shapes = args.model.startswith("shapes-")
        args.prompts = args.prompts or ("shapes:held_out" if shapes else "geneval")
        settle_drawing(args)
        prompts = load_prompts(args.prompts, limit=args.max_prompts)
        detector = choose_detector(args.detector, [p.metadata for p in prompts])
        fill(args, folder, prompts)
        made = made_with(args)
    else:
        made = read_made(folder)
    with console.counting("scores") as progress:
        result = score_filled(
            folder,
            lambda metadata: detector or choose_detector(args.detector, metadata),
            made,
            batch_size=args.batch_size or options.BATCH_SIZE,
            progress=progress,
        )
    if not state.is_main_process:
        return
    print_scores(
        f"GenEval of {folder}, seen by {result['detector']['name']}",
        result["tasks"],
        result["intervals"],
    )
    write_result(args.output or folder / "summary.json", result)
    if result["scored"] == 0:
        raise UsageError(f"no image of {folder} could be read: {result['first_error']}")
    print(f"images and scores: {folder}")
    suggest("evaluate", "report", "--folders", folder, "--output", folder / "report.html")


VERB = Verb(
    "geneval",
    "fill a folder in GenEval's layout with a model's images, or take one, and score it",
    add_flags,
    run,
    shares=True,
    resumes=True,
)
