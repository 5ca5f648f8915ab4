"""`diffalign pairs`: a preference set from a model and a reward, for those who have no votes."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from diffalign.commands.geneval import fill_folder
from diffalign.commands.rewards import load_rewards
from diffalign.core import processes
from diffalign.core.errors import UsageError
from diffalign.core.files import write_text
from diffalign.data.images import CaptionedImage, batches
from diffalign.data.pairs.ranking import choose_pairs, rank_weights
from diffalign.data.pairs.structures import of_image
from diffalign.data.pairs.tables import OWN
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.geneval import read_samples
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.detection import DetectionReward


def pairs(args: argparse.Namespace) -> int:
    """Draw what is missing of the images, score all of them, and write which of a prompt's are better."""
    if args.images_per_prompt < 2:
        raise UsageError("--images_per_prompt: a pair needs at least 2 images of a prompt")
    if args.weights == "rankdpo" and args.pick != "all":
        raise UsageError("--weights=rankdpo weighs all pairs of a ranking: it needs --pick=all")
    state = processes.current()
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    reward = load_rewards(args.rewards, [p.metadata for p in prompts])
    fill_folder(args, prompts, state)
    images, _ = read_samples(args.output_dir)
    mine = range(state.process_index, len(images), state.num_processes)
    rows = _scored([images[i] for i in mine], reward, batch_size=args.batch_size)
    rows = sorted(gather_object(rows), key=lambda row: row["file"])
    if state.is_main_process:
        _write(args, rows, reward)
    return 0


def _scored(
    images: list[CaptionedImage], reward: CompositeReward, *, batch_size: int
) -> list[dict[str, Any]]:
    """One row an image: its rewards, and, where a reward looks for objects, what it found."""
    eyes = next((r for r in reward.rewards.values() if isinstance(r, DetectionReward)), None)
    rows: list[dict[str, Any]] = [{} for _ in images]
    for numbers, pixels, error in batches(images, size=batch_size):
        if pixels is None:
            rows[numbers[0]] = {"file": str(images[numbers[0]].path), "error": error}
            continue
        asked = [images[i].prompt for i in numbers]
        metadata = [p.metadata for p in asked]
        found = reward.score(pixels, [p.text for p in asked], metadata)
        objects = eyes.detect(pixels, metadata) if eyes else None
        for k, i in enumerate(numbers):
            scores = {n: float(found.details[n][k]) for n in reward.rewards}
            rows[i] = {
                "file": str(images[i].path),
                "prompt": asked[k].text,
                "metadata": metadata[k],
                "reward": float(found.values[k]),
                "scores": scores,
                "structure": None if objects is None else of_image(objects[k], scores).to_dict(),
            }
    return rows


def _write(args: argparse.Namespace, rows: list[dict[str, Any]], reward: CompositeReward) -> None:
    """`pairs.jsonl`; UsageError where no prompt has a better image."""
    broken = [r for r in rows if "error" in r]
    usable = [r for r in rows if "error" not in r]
    groups = groupby(usable, key=lambda r: Path(r["file"]).parents[1].name)
    found = [row for _, group in groups for row in _pairs(args, list(group))]
    if args.weights == "rankdpo" and found:
        mean = sum(row["weight"] for row in found) / len(found)
        for row in found:  # a learning rate means the same with and without
            row["weight"] /= mean
    lines = [json.dumps(row) for row in found]
    if not lines:
        raise UsageError(
            f"no prompt has images with different rewards: {reward.last_error or 'all are equal'}"
        )
    write_text(args.output_dir / OWN, "".join(f"{line}\n" for line in lines))
    result = {
        "pairs": len(lines),
        "prompts": len({Path(r["file"]).parents[1] for r in usable}),
        "images": len(rows),
        "unreadable": len(broken),
        "mean_reward": float(np.nanmean([r["reward"] for r in usable])),
        "file": str(args.output_dir / OWN),
    }
    print(json.dumps(result))


def _pairs(args: argparse.Namespace, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one prompt's images."""
    scores = [r["reward"] for r in images]
    chosen = choose_pairs(scores, pick=args.pick, min_gap=args.min_gap)
    rows = [_row(args.output_dir, images[a], images[b]) for a, b in chosen]
    if args.weights == "rankdpo" and rows:
        for row, weight in zip(rows, rank_weights(scores, chosen), strict=True):
            row["weight"] = weight
    return rows


def _row(folder: Path, better: dict[str, Any], worse: dict[str, Any]) -> dict[str, Any]:
    """A line of the layout that `pairs.source` calls diffalign."""
    both = (better, worse)
    found = {
        "prompt": better["prompt"],
        "image_0": str(Path(better["file"]).relative_to(folder)),
        "image_1": str(Path(worse["file"]).relative_to(folder)),
        "label": 1.0,
        "scores": [r["scores"] for r in both],
        "metadata": better["metadata"],
    }
    if all(r["structure"] for r in both):
        found["structures"] = [r["structure"] for r in both]
    return found
