"""The verb evaluate: a model, a folder of images, GenEval."""

from __future__ import annotations

import argparse
import json

from diffalign.commands.compare import evaluate_report, evaluate_wins
from diffalign.commands.fid import evaluate_fid
from diffalign.commands.geneval import evaluate_geneval
from diffalign.commands.images import batching, drawing, evaluation, load
from diffalign.commands.output import print_scores, write_result
from diffalign.commands.rewards import check_captions, load_rewards
from diffalign.core.errors import UsageError
from diffalign.core.versions import versions
from diffalign.data.images import read_folder
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.folder import counts, score_folder
from diffalign.evaluation.score import evaluate_model


def evaluate(args: argparse.Namespace) -> int:
    """Score a model on prompts, or a folder of images; the last line of the output is JSON."""
    verbs = {
        "rewards": _evaluate_folder,
        "geneval": evaluate_geneval,
        "fid": evaluate_fid,
        "wins": evaluate_wins,
        "report": evaluate_report,
    }
    for name in ("batch_size", "images_per_prompt", "images_per_task", "max_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if args.images_per_task is not None and args.what != "model":
        raise UsageError(f"--images_per_task is not for `evaluate {args.what}`")
    if args.what in verbs:
        return verbs[args.what](args)
    if args.images is not None:
        raise UsageError("--images: meant `diffalign evaluate rewards --images ...`?")
    if args.images_per_prompt is None:
        args.images_per_prompt = 1
    args.rewards = args.rewards or "verifier"
    args.prompts = args.prompts or "shapes:held_out"
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    reward = load_rewards(args.rewards, [p.metadata for p in prompts])
    model = load(args)
    found = evaluate_model(model, prompts, reward.score, evaluation(args), **batching(args))
    result = {
        **drawing(args),
        "images_per_task": args.images_per_task,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        **found.to_dict(),
        "versions": versions(),
    }
    title = f"{args.model}{' + ' + args.lora if args.lora else ''}"
    print_scores(title, {**found.tasks, **found.means})
    write_result(args.output, result)
    print(json.dumps(result))
    return 0


def _evaluate_folder(args: argparse.Namespace) -> int:
    if args.images is None:
        raise UsageError("evaluate rewards needs --images DIR")
    images = read_folder(args.images)
    reward = load_rewards(args.rewards or "verifier", [i.prompt.metadata for i in images])
    check_captions(reward, images, args.images)
    rows, means = score_folder(images, reward.score, batch_size=args.batch_size)
    unreadable = sum("error" in row for row in rows)
    result = {
        "folder": str(args.images),
        "images": len(rows),
        "unreadable": unreadable,
        "without_caption": sum(not i.prompt.text for i in images),
        "counts": counts(rows, reward.rewards),
        "means": means,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        "versions": versions(),
    }
    print_scores(f"{len(rows) - unreadable} of {len(rows)} images in {args.images}", means)
    write_result(args.output, {**result, "scores": rows})
    print(json.dumps(result))
    if unreadable == len(rows):
        raise UsageError(f"no image could be read, for instance {rows[0]['error']}")
    if not means:
        raise UsageError(f"no image could be scored: {reward.last_error or 'all rewards are NaN'}")
    return 0
