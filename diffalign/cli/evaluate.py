"""`diffalign evaluate`: what is measured is a verb below it. `evaluate model` scores a model on prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli import compare, fid, geneval, options, score
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evaluate model`."""
    options.add_evaluation(parser)
    parser.add_argument(
        "--prompts",
        default="shapes:held_out",
        help="shapes:held_out, geneval or a file; default: %(default)s",
    )
    parser.add_argument(
        "--rewards", default="verifier", help="comma-separated; default: %(default)s"
    )
    parser.add_argument("--max_prompts", type=int, default=None, help="score only so many prompts")
    parser.add_argument("--images_per_prompt", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--images_per_task", type=int, default=None, help="instead: so many images of every task"
    )
    # a folder was meant for `evaluate rewards`: say so
    parser.add_argument("--images", type=Path, default=None, help=argparse.SUPPRESS)
    options.add_model(parser)
    options.add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """Score a model on prompts; the last line of the output is JSON."""
    from diffalign.cli.models import batching, drawing, evaluation, load
    from diffalign.cli.output import print_scores, write_result
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.core.versions import versions
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.score import evaluate_model

    options.check_counts(args)
    if args.images is not None:
        raise UsageError("--images: meant `diffalign evaluate rewards --images ...`?")
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    reward = load_rewards(args.rewards, [p.metadata for p in prompts])
    scores = evaluate_model(load(args), prompts, reward.score, evaluation(args), **batching(args))
    result = {
        **drawing(args),
        "images_per_task": args.images_per_task,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        **scores.to_dict(),
        "versions": versions(),
    }
    title = f"{args.model}{' + ' + args.lora if args.lora else ''}"
    intervals = result["intervals"]
    print_scores(
        title, {**scores.tasks, **scores.means}, {**intervals["tasks"], **intervals["means"]}
    )
    write_result(args.output, result)
    print(json.dumps(result))


MODEL = Verb("model", "generate images of prompts and score them", add_flags, run)
VERB = Verb(
    "evaluate",
    "score a model, with or without a LoRA, or a folder of images",
    add_flags,
    run,
    verbs=(MODEL, score.VERB, geneval.VERB, fid.VERB, compare.WINS, compare.REPORT),
)
