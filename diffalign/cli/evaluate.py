"""`diffalign evaluate`, with one verb below it per kind of evaluation.

This file has `evaluate model`, which scores a model on prompts.
"""

from __future__ import annotations

import argparse

from diffalign.cli import compare, fid, geneval, options, score, types
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


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


def run(args: argparse.Namespace) -> None:
    """Generate images of prompts, score them, and print the scores."""
    from diffalign.cli.models import batching, drawing, evaluation, load, settle_drawing
    from diffalign.cli.output import print_evaluation, write_result
    from diffalign.cli.rewards import load_rewards
    from diffalign.core import console
    from diffalign.core.errors import UsageError
    from diffalign.core.versions import versions
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.score import evaluate_model, repeat_prompts
    from diffalign.training.rerun import drawn_otherwise, read_config, run_of

    if args.images is not None:
        raise UsageError("images: meant `diffalign evaluate rewards --images ...`?")
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
    config = evaluation(args)
    total = len(repeat_prompts(prompts, config))
    model = load(args)
    with console.counting("images") as progress:
        progress(0, total)
        scores = evaluate_model(
            model,
            prompts,
            reward.score,
            config,
            on_images=lambda part, images: progress(part.start + len(images), total),
            **batching(args),
        )
    result = {
        **drawing(args),
        "images_per_task": args.images_per_task,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        **scores.to_dict(),
        "versions": versions(),
    }
    title = f"{args.model}{' + ' + args.lora if args.lora else ''}"
    print_evaluation(title, result)
    write_result(args.output, result)


def _evaluate_run(args: argparse.Namespace) -> None:
    """Evaluate the policy of --run with the run's settings, and print the run's own score."""
    import torch

    from diffalign.cli.output import print_evaluation, write_result
    from diffalign.core.errors import UsageError
    from diffalign.core.versions import versions
    from diffalign.evaluation.figures import number
    from diffalign.training.rerun import FinishedRun

    parser = Parser(add_help=False)
    add_flags(parser)
    conflicts = [
        f"`{name}`"
        for name, default in vars(parser.parse_args([])).items()
        if name not in ("run", "output") and getattr(args, name, default) != default
    ]
    if conflicts:
        raise UsageError(
            f"run: draws with the settings of the run in {args.run}; leave out {', '.join(conflicts)}, "
            "or name the LoRA with `lora` instead"
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
    print_evaluation(f"{args.run}, drawn as the run did", result)
    name, part = ("overall", "tasks") if scores.tasks else ("reward", "means")
    if name in own.get(part, {}):
        print(f"{name} as the run measured it: {number(own[part][name])}")
    write_result(args.output, result)


MODEL = Verb("model", "draw images of prompts with a model and score them", add_flags, run)
VERB = Verb(
    "evaluate",
    "score a model, a folder of images, or two folders beside each other",
    add_flags,
    run,
    verbs=(MODEL, score.VERB, geneval.VERB, fid.VERB, compare.WINS, compare.REPORT),
    description="Score a model or images. Without a verb below it, `diffalign evaluate` is `diffalign evaluate model`.",
    epilog="""examples:
  diffalign evaluate --model shapes-sd3 --lora runs/demo/lora --rewards verifier
  diffalign evaluate rewards --images runs/images --rewards jpeg
  diffalign evaluate fid --generated runs/images --reference photos
  diffalign evaluate wins --images runs/after --against runs/before --rewards pickscore
  diffalign evaluate report --folders base=runs/before lora=runs/after --output report.html

`diffalign evaluate VERB --help` shows the flags of each.""",
)
