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
        "--run",
        type=Path,
        default=None,
        metavar="DIR",
        help="evaluate the policy of a run folder as the run did: its model, prompts, rewards, steps, guidance, "
        "sizes and seeds",
    )
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
    from diffalign.cli.models import batching, drawing, evaluation, load, settle_drawing
    from diffalign.cli.output import print_scores, write_result
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.core.versions import versions
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.score import evaluate_model
    from diffalign.training.rerun import drawn_otherwise, read_config, run_of

    options.check_counts(args)
    if args.images is not None:
        raise UsageError("--images: meant `diffalign evaluate rewards --images ...`?")
    if args.run is not None:
        _evaluate_run(args)
        return
    settle_drawing(args)
    folder = run_of(args.lora)
    if folder is not None:
        others = drawn_otherwise(read_config(folder), evaluation(args), args.prompts)
        if others:
            print(
                f"note: the run in {folder} drew its images in another way ({'; '.join(others)}); "
                f"`diffalign evaluate --run {folder}` draws as the run did"
            )
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


def _evaluate_run(args: argparse.Namespace) -> None:
    """Evaluate the policy of --run as the run did, and print the run's own figure beside it."""
    import torch

    from diffalign.cli.output import print_scores, write_result
    from diffalign.core.errors import UsageError
    from diffalign.core.versions import versions
    from diffalign.training.rerun import FinishedRun

    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    given = [
        f"--{name}"
        for name, default in vars(parser.parse_args([])).items()
        if name not in ("run", "output") and getattr(args, name, default) != default
    ]
    if given:
        raise UsageError(
            f"--run: draws with the settings of the run in {args.run}; leave out {', '.join(given)}, "
            "or name the LoRA with --lora instead"
        )
    finished = FinishedRun.read(args.run)
    scores = finished.evaluate("cuda" if torch.cuda.is_available() else "cpu")
    config, own = finished.config, finished.summary.get("after", {})
    result = {
        "run": str(args.run),
        "model": config.model.name,
        "prompts": config.prompts.evaluation,
        **vars(config.evaluation),
        "rewards": dict(config.rewards),
        **scores.to_dict(),
        "of_the_run": {part: own.get(part, {}) for part in ("tasks", "means")},
        "versions": versions(),
    }
    intervals = result["intervals"]
    print_scores(
        f"{args.run}, drawn as the run did",
        {**scores.tasks, **scores.means},
        {**intervals["tasks"], **intervals["means"]},
    )
    name, part = ("overall", "tasks") if scores.tasks else ("reward", "means")
    if name in own.get(part, {}):
        print(f"{name} as the run measured it: {own[part][name]:.3f}")
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
