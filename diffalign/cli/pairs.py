"""`diffalign pairs`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pairs`."""
    parser.add_argument("--prompts", default="shapes:train", help="default: %(default)s")
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
    from diffalign.cli.models import batching, evaluation, load, made_with
    from diffalign.cli.rewards import load_rewards
    from diffalign.core import processes
    from diffalign.core.errors import UsageError
    from diffalign.data.pairs.make import PairOptions, make_pairs
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.fill import fill_folder
    from diffalign.evaluation.geneval import read_samples

    pick = PairOptions(args.pick, args.weights, args.min_gap)
    state = processes.current()
    if args.images_per_prompt < 2:
        raise UsageError("--images_per_prompt: a pair needs at least 2 images of a prompt")
    if args.record_states is not None and args.lora is not None:
        raise UsageError(
            "--record_states: states are of the model that is to be trained, without --lora"
        )
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
    result = make_pairs(
        args.output_dir, images, reward, pick, batch_size=args.batch_size, state=state
    )
    if state.is_main_process:
        print(json.dumps(result))


VERB = Verb(
    "pairs",
    "make preference pairs with a model and a reward",
    add_flags,
    run,
    description="Draw images of prompts (in GenEval's layout, resumable), score them and write pairs.jsonl: which "
    "of a prompt's images are better. `pairs.source` of a recipe takes the folder (docs/preferences.md).",
    shares=True,
    resumes=True,
)
