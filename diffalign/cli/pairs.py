"""`diffalign pairs`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli import options
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.data.images import CaptionedImage
    from diffalign.rewards.composition import CompositeReward


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pairs`."""
    parser.add_argument(
        "--images",
        type=Path,
        default=None,
        help="make pairs of these images, several of each caption, and draw none (docs/data.md)",
    )
    parser.add_argument("--prompts", default=None, help="default: shapes:train")
    parser.add_argument(
        "--rewards", default="verifier", help="comma-separated; default: %(default)s"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--images_per_prompt", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--max_prompts", type=int, default=None, help="only so many prompts")
    parser.add_argument(
        "--record_states",
        type=int,
        default=None,
        metavar="K",
        help="keep K states of each image on its way from noise, for `pairs.inversion.solver=recorded`: Inversion-DPO "
        "without an inversion; default: none",
    )
    parser.add_argument(
        "--pick",
        default="best_worst",
        choices=("best_worst", "nested", "all"),
        help="of a prompt's images: default %(default)s, one pair; nested: each image once, best with worst, second "
        "with second worst",
    )
    parser.add_argument(
        "--weights",
        default="equal",
        choices=("equal", "rankdpo"),
        help="of pairs: default %(default)s; rankdpo, for --pick all: by gain and rank",
    )
    parser.add_argument(
        "--min_gap",
        type=float,
        default=0.0,
        help="least difference of rewards; default: %(default)s",
    )
    options.add_model(parser)
    options.add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """Draw what is missing of the images, score all of them, and write which of a prompt's are better."""
    from diffalign.core import processes
    from diffalign.data.pairs.make import PairOptions, by_caption, by_place, make_pairs

    pick = PairOptions(args.pick, args.weights, args.min_gap)
    state = processes.current()
    images, reward = _given(args) if args.images else _drawn(args)
    result = make_pairs(
        args.output_dir,
        images,
        reward,
        pick,
        batch_size=args.batch_size or options.BATCH_SIZE,
        state=state,
        group=by_caption if args.images else by_place,
    )
    if state.is_main_process:
        print(json.dumps(result))


def _given(args: argparse.Namespace) -> tuple[list[CaptionedImage], CompositeReward]:
    """Return the images of --images that can be compared, and the rewards."""
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.data.images import read_folder, require_captions
    from diffalign.data.pairs.make import comparable
    from diffalign.evaluation.geneval import SETTINGS

    for name in ("prompts", "lora", "record_states", "max_prompts"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name}: with --images nothing is drawn; leave one of them out")
    if (args.output_dir / SETTINGS).is_file() and args.output_dir != args.images:
        raise UsageError(
            f"--output_dir: {args.output_dir} holds images that were drawn, and their pairs; choose another folder"
        )
    images = read_folder(args.images)
    require_captions(images, args.images, why="pairs are of images of one caption")
    images = comparable(images, args.images)
    return images, load_rewards(args.rewards, [i.prompt.metadata for i in images])


def _drawn(args: argparse.Namespace) -> tuple[list[CaptionedImage], CompositeReward]:
    """Draw what is missing of the images in --output_dir, and return all of them with the rewards."""
    from diffalign.cli.models import batching, evaluation, load, made_with, settle_drawing
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.fill import fill_folder
    from diffalign.evaluation.geneval import read_samples

    args.prompts = args.prompts or "shapes:train"
    if args.images_per_prompt < 2:
        raise UsageError("--images_per_prompt: a pair needs at least 2 images of a prompt")
    if args.record_states is not None and args.lora is not None:
        raise UsageError(
            "--record_states: states are of the model that is to be trained, without --lora"
        )
    settle_drawing(args)
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    reward = load_rewards(args.rewards, [p.metadata for p in prompts])
    fill_folder(
        args.output_dir,
        prompts,
        lambda: load(args),
        evaluation(args),
        made=made_with(args),
        states=args.record_states,
        **batching(args),
    )
    images, _ = read_samples(args.output_dir)
    return images, reward


VERB = Verb(
    "pairs",
    "make preference pairs with a model and a reward, or of images that exist",
    add_flags,
    run,
    description="Draw images of prompts (in GenEval's layout, resumable), score them and write pairs.jsonl: which "
    "of a prompt's images are better. With --images nothing is drawn. `pairs.source` of a recipe takes the folder "
    "(docs/preferences.md).",
    shares=True,
    resumes=True,
)
