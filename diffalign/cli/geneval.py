"""`diffalign evaluate geneval`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evaluate geneval`."""
    options.add_images(parser)
    parser.add_argument(
        "--prompts",
        default=None,
        help="geneval, shapes:held_out or a file; default: that of the model's world",
    )
    parser.add_argument("--max_prompts", type=int, default=None, help="only so many prompts")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/geneval"),
        help="filled and resumed; default: %(default)s",
    )
    parser.add_argument(
        "--detector",
        default=None,
        choices=("verifier", "geneval", "geneval_compat"),
        help="default: the one that knows the prompts' classes",
    )
    options.add_evaluation(parser)
    options.add_model(parser)
    options.add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """Generate the missing images of a GenEval folder, or take a folder that exists, and score it."""
    from diffalign.cli.models import batching, evaluation, load, made_with, settle_drawing
    from diffalign.cli.output import print_scores, write_result
    from diffalign.core import processes
    from diffalign.core.errors import UsageError
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.fill import fill_folder, read_made, score_filled
    from diffalign.rewards.detection import choose_detector

    options.check_counts(args)
    state = processes.current()
    folder, detector = args.images or args.output_dir, None
    if args.images is None:
        shapes = args.model.startswith("shapes-")
        args.prompts = args.prompts or ("shapes:held_out" if shapes else "geneval")
        settle_drawing(args)
        prompts = load_prompts(args.prompts, limit=args.max_prompts)
        detector = choose_detector(args.detector, [p.metadata for p in prompts])
        made = made_with(args)
        fill_folder(
            folder, prompts, lambda: load(args), evaluation(args), made=made, **batching(args)
        )
    else:
        made = read_made(folder)
    result = score_filled(
        folder,
        lambda metadata: detector or choose_detector(args.detector, metadata),
        made,
        batch_size=args.batch_size or options.BATCH_SIZE,
    )
    if not state.is_main_process:
        return
    print_scores(
        f"GenEval of {folder}, seen by {result['detector']['name']}",
        result["tasks"],
        result["intervals"],
    )
    print(json.dumps(result))
    write_result(args.output or folder / "summary.json", result)
    if result["scored"] == 0:
        raise UsageError(f"no image of {folder} could be read: {result['first_error']}")


VERB = Verb(
    "geneval",
    "fill a folder in GenEval's layout with a model's images, or take one, and score it",
    add_flags,
    run,
    shares=True,
    resumes=True,
)
