"""`diffalign evaluate geneval`: fill a folder in GenEval's layout, or take one, and score it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from diffalign.commands.images import batching, drawing, evaluation, fingerprint, load
from diffalign.commands.output import print_scores, write_result
from diffalign.core import processes
from diffalign.core.errors import UsageError
from diffalign.core.versions import versions
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.geneval import (
    RESULTS,
    SETTINGS,
    claim,
    generate_samples,
    read_samples,
    read_settings,
    score_samples,
    summary,
    write_prompts,
    write_rows,
)
from diffalign.evaluation.recording import StateKeeper
from diffalign.rewards.base import RewardError
from diffalign.rewards.detection import DetectionReward
from diffalign.rewards.registry import create

DETECTORS = ("verifier", "geneval")


def evaluate_geneval(args: argparse.Namespace) -> int:
    """Generate what is missing of a GenEval folder, or take one that is there, and score it."""
    state = processes.current()
    folder = args.images or args.output_dir
    made: dict[str, Any] = {}
    detector = None
    if args.images is None:
        made, detector = _generate_samples(args, state)
    elif (folder / SETTINGS).is_file():
        made = read_settings(folder)
    images, empty = read_samples(folder)
    detector = detector or _detector(args.detector, [i.prompt.metadata for i in images])
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
    found = summary(rows, empty=empty)
    result = {
        "folder": str(folder),
        **made,
        "detector": vars(detector.card),
        **found,
        "versions": versions(),
    }
    print_scores(f"GenEval of {folder}, seen by {detector.card.name}", found["tasks"])
    print(json.dumps(result))
    try:
        write_rows(folder / RESULTS, rows)
        write_result(args.output or folder / "summary.json", result)
    except OSError as error:
        raise UsageError(f"the results could not be written: {error}") from error
    if found["scored"] == 0:
        raise UsageError(f"no image of {folder} could be read, for instance {rows[0]['error']}")
    return 0


def _generate_samples(
    args: argparse.Namespace, state: PartialState
) -> tuple[dict[str, Any], DetectionReward]:
    """The images of --model that are not yet in --output_dir; how they were made, and who is to look at them."""
    if args.images_per_prompt is None:
        args.images_per_prompt = 4
    shapes = args.model.startswith("shapes-")
    args.prompts = args.prompts or ("shapes:held_out" if shapes else "geneval")
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    detector = _detector(args.detector, [p.metadata for p in prompts])  # is it there? better now
    return fill_folder(args, prompts, state), detector


def fill_folder(
    args: argparse.Namespace, prompts: Sequence[Prompt], state: PartialState
) -> dict[str, Any]:
    """Draw what is missing of the prompts' images in --output_dir, all processes together; returns how they are made.

    Raises:
        GenEvalError: the folder is being filled in another way.
    """
    states = getattr(args, "record_states", None)
    keeper = None if states is None else _keeper(args, states)  # what it refuses is not noted
    made = {
        **drawing(args),
        "model_fingerprint": fingerprint(args.model),
        "lora_fingerprint": fingerprint(args.lora),
        "max_prompts": args.max_prompts,
        "images_per_prompt": args.images_per_prompt,
        "height": args.height,
        "width": args.width,
        "dtype": args.dtype,
        "record_states": states,
    }
    if state.is_main_process:
        claim(args.output_dir, made)
        write_prompts(args.output_dir, prompts)
    state.wait_for_everyone()
    generate_samples(
        keeper.model if keeper else load(args),
        prompts,
        args.output_dir,
        evaluation(args),
        process=(state.process_index, state.num_processes),
        keeper=keeper,
        **batching(args),
    )
    state.wait_for_everyone()
    return made


def _keeper(args: argparse.Namespace, states: int) -> StateKeeper:
    """Of so many states of each image of --model."""
    if args.lora is not None:
        raise UsageError(
            "--record_states: states are of the model that is to be trained, without --lora"
        )
    sizes = {k: v for k, v in batching(args).items() if k != "micro_batch_size"}
    return StateKeeper(load(args), evaluation(args), states, **sizes)


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
