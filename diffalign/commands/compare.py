"""`diffalign evaluate wins` and `evaluate report`: folders of images beside each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.commands.output import print_scores, write_result
from diffalign.commands.rewards import check_captions, load_rewards
from diffalign.core.errors import UsageError
from diffalign.core.versions import versions
from diffalign.data.images import read_folder
from diffalign.evaluation.comparison import Compared, read_geneval, write_comparison
from diffalign.evaluation.folder import counts, score_folder
from diffalign.evaluation.preference import by_name, shared_names, win_rate


def evaluate_wins(args: argparse.Namespace) -> int:
    """How often the images of --images are preferred to those of the same name in --against."""
    if args.images is None or args.against is None:
        raise UsageError("evaluate wins needs --images DIR and --against DIR")
    folders = (args.images, args.against)
    sets = [
        by_name(read_folder(folder, flag=flag), folder)
        for folder, flag in zip(folders, ("--images", "--against"), strict=True)
    ]
    pairs = shared_names(sets)
    chosen = [[images[name] for name in pairs] for images in sets]
    reward = load_rewards(args.rewards or "verifier", [i.prompt.metadata for i in chosen[0]])
    check_captions(reward, chosen[0], args.images)
    rows = [score_folder(c, reward.score, batch_size=args.batch_size)[0] for c in chosen]
    prompts = [image.prompt.text or str(i) for i, image in enumerate(chosen[0])]
    found: dict[str, Any] = {}
    for name in reward.rewards:
        a, b = (np.array([r.get(name) for r in side], np.float64) for side in rows)
        rate = win_rate(a, b, prompts)
        found[name] = None if rate is None else vars(rate)
    result = {
        "images": str(args.images),
        "against": str(args.against),
        "pairs": len(pairs),
        "without_partner": sum(map(len, sets)) - 2 * len(pairs),
        "unreadable": sum("error" in r for side in rows for r in side),
        "counts": {
            str(folder): counts(side, reward.rewards)
            for folder, side in zip(folders, rows, strict=True)
        },
        "win_rate": found,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        "versions": versions(),
    }
    print_scores(
        f"{args.images} wins against {args.against}",
        {n: rate["rate"] for n, rate in found.items() if rate},
    )
    write_result(args.output, result)
    print(json.dumps(result))
    if not any(found.values()):
        raise UsageError(f"no pair could be scored: {reward.last_error or 'all rewards are NaN'}")
    return 0


def evaluate_report(args: argparse.Namespace) -> int:
    """A page that compares the folders of --folders; with --rewards their images are scored first."""
    if not args.folders or args.output is None:
        raise UsageError("evaluate report needs --folders [NAME=]DIR ... and --output PAGE.html")
    reward = load_rewards(args.rewards, []) if args.rewards else None
    sides = []
    for text in args.folders:
        name, _, path = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        folder = Path(path)
        images = read_folder(folder, flag="--folders")
        means: dict[str, float] = {}
        scored: dict[str, dict[str, int]] = {}
        if reward is not None:
            reward.check_metadata([i.prompt.metadata for i in images])
            check_captions(reward, images, folder)
            rows, scores = score_folder(images, reward.score, batch_size=args.batch_size)
            scored = counts(rows, reward.rewards)
            means = {n: scores[n] for n in reward.rewards if n in scores}
        found = by_name(images, folder)
        sides.append(
            Compared(name or folder.name, folder, found, read_geneval(folder), means, scored)
        )
    names = [s.name for s in sides]
    if len(set(names)) < len(names):
        raise UsageError(
            f"--folders: two are called the same ({', '.join(names)}); NAME=DIR names them"
        )
    found = write_comparison(args.output, sides)
    print(json.dumps({**found, "counts": {s.name: s.counts for s in sides}}))
    return 0
