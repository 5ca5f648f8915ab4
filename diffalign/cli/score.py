"""`diffalign evaluate rewards`."""

from __future__ import annotations

import argparse
import json

from diffalign.cli import options
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evaluate rewards`."""
    options.add_images(parser)
    parser.add_argument(
        "--rewards", default="verifier", help="comma-separated; default: %(default)s"
    )
    options.add_evaluation(parser)
    options.add_batch_size(parser)


def run(args: argparse.Namespace) -> None:
    """Score the images of a folder; the last line of the output is JSON."""
    from diffalign.cli.output import print_scores, write_result
    from diffalign.cli.rewards import load_usable_rewards
    from diffalign.core.errors import UsageError
    from diffalign.data.images import read_folder
    from diffalign.evaluation.folder import folder_result, score_folder

    options.check_counts(args)
    if args.images is None:
        raise UsageError("evaluate rewards needs --images DIR")
    images = read_folder(args.images)
    reward = load_usable_rewards(args.rewards, images)
    rows, means = score_folder(images, reward.score, batch_size=args.batch_size)
    result = folder_result(args.images, images, rows, means, reward)
    unreadable = result["unreadable"]
    print_scores(
        f"{len(rows) - unreadable} of {len(rows)} images in {args.images}",
        means,
        result["intervals"],
    )
    write_result(args.output, {**result, "scores": rows})
    print(json.dumps(result))
    if unreadable == len(rows):
        raise UsageError(f"no image could be read, for instance {rows[0]['error']}")
    if not means:
        raise UsageError(f"no image could be scored: {reward.last_error or 'all rewards are NaN'}")


VERB = Verb("rewards", "score the images of a folder", add_flags, run)
