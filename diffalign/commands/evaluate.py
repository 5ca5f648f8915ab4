"""The verb evaluate: a model, a folder of images, GenEval."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from diffalign.commands.compare import evaluate_report, evaluate_wins
from diffalign.commands.fid import evaluate_fid
from diffalign.commands.images import batching, evaluation, load
from diffalign.commands.output import print_scores, write_result
from diffalign.commands.rewards import load_rewards
from diffalign.data.images import read_folder
from diffalign.data.prompts import load_prompts
from diffalign.errors import UsageError
from diffalign.evaluation.folder import score_folder
from diffalign.evaluation.geneval import (
    RESULTS,
    claim,
    generate_samples,
    read_samples,
    score_samples,
    summary,
    write_prompts,
    write_rows,
)
from diffalign.evaluation.score import evaluate_model
from diffalign.rewards.base import RewardError
from diffalign.rewards.detection import DetectionReward
from diffalign.rewards.registry import create
from diffalign.versions import versions

DETECTORS = ("verifier", "geneval")


def evaluate(args: argparse.Namespace) -> int:
    """Score a model on prompts, or a folder of images; the last line of the output is JSON."""
    verbs = {
        "rewards": _evaluate_folder,
        "geneval": _evaluate_geneval,
        "fid": evaluate_fid,
        "wins": evaluate_wins,
        "report": evaluate_report,
    }
    if args.what in verbs:
        return verbs[args.what](args)
    if args.images is not None:
        raise UsageError("--images: meant `diffalign evaluate rewards --images ...`?")
    args.images_per_prompt = args.images_per_prompt or 1
    args.rewards = args.rewards or "verifier"
    args.prompts = args.prompts or "shapes:held_out"
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    reward = load_rewards(args.rewards, [p.metadata for p in prompts])
    model = load(args)
    found = evaluate_model(model, prompts, reward.score, evaluation(args), **batching(args))
    result = {
        "model": args.model,
        "lora": args.lora,
        "prompts": args.prompts,
        "num_inference_steps": args.num_inference_steps,
        "solver": args.solver,
        "guidance_scale": args.guidance_scale,
        "images_per_task": args.images_per_task,
        "seed": args.seed,
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
    without = sum(not i.prompt.text for i in images)
    blind = [n for n, r in reward.rewards.items() if r.needs_prompt]
    if blind and without == len(images):
        raise UsageError(
            f"{', '.join(blind)} needs captions, and no image of {args.images} has one; see docs/rewards.md"
        )
    rows, means = score_folder(images, reward.score, batch_size=args.batch_size)
    unreadable = sum("error" in row for row in rows)
    result = {
        "folder": str(args.images),
        "images": len(rows),
        "unreadable": unreadable,
        "without_caption": without,
        "failed": {n: count for n, count in reward.failures.items() if count},
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


def _evaluate_geneval(args: argparse.Namespace) -> int:
    """Generate what is missing of a GenEval folder, or take one that is there, and score it."""
    state = PartialState()
    folder = args.images or args.output_dir
    made: dict[str, Any] = {}
    if args.images is None:
        made = _generate_samples(args, state)
    images = read_samples(folder)
    detector = _detector(args.detector, [i.prompt.metadata for i in images])
    mine = range(state.process_index, len(images), state.num_processes)
    rows = score_samples(
        [images[i] for i in mine],
        detector.detect,
        batch_size=args.batch_size,
        compat=detector.compat,
    )
    rows = sorted(gather_object(rows), key=lambda row: row["filename"])
    if not state.is_main_process:
        return 0
    write_rows(folder / RESULTS, rows)
    found = summary(rows)
    result = {
        "folder": str(folder),
        **made,
        "detector": vars(detector.card),
        **found,
        "versions": versions(),
    }
    print_scores(f"GenEval of {folder}, seen by {detector.card.name}", found["tasks"])
    write_result(args.output or folder / "summary.json", result)
    print(json.dumps(result))
    if found["scored"] == 0:
        raise UsageError(f"no image of {folder} could be read, for instance {rows[0]['error']}")
    return 0


def _generate_samples(args: argparse.Namespace, state: PartialState) -> dict[str, Any]:
    """The images of --model that are not yet in --output_dir; how they were made."""
    args.images_per_prompt = args.images_per_prompt or 4
    shapes = args.model.startswith("shapes-")
    args.prompts = args.prompts or ("shapes:held_out" if shapes else "geneval")
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    _detector(args.detector, [p.metadata for p in prompts])  # what is missing is to be known now
    made = {
        "model": args.model,
        "lora": args.lora,
        "prompts": args.prompts,
        "max_prompts": args.max_prompts,
        "num_inference_steps": args.num_inference_steps,
        "solver": args.solver,
        "guidance_scale": args.guidance_scale,
        "height": args.height,
        "width": args.width,
        "dtype": args.dtype,
        "seed": args.seed,
    }
    if state.is_main_process:
        claim(args.output_dir, made)
        write_prompts(args.output_dir, prompts)
    state.wait_for_everyone()
    generate_samples(
        load(args),
        prompts,
        args.output_dir,
        evaluation(args),
        process=(state.process_index, state.num_processes),
        **batching(args),
    )
    state.wait_for_everyone()
    return made


def _detector(name: str | None, metadata: Sequence[Mapping[str, Any]]) -> DetectionReward:
    """The named one, else the first that knows every class of the prompts."""
    problems = []
    for choice in (name,) if name else DETECTORS:
        detector = create(choice)
        assert isinstance(detector, DetectionReward)
        try:
            detector.check_metadata(metadata)
        except RewardError as error:
            problems.append(str(error))
            continue
        detector.prepare()
        return detector
    raise UsageError("; ".join(problems))
