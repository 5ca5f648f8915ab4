"""`diffalign evaluate rewards`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `evaluate rewards`."""

    images: Path | None
    rewards: list[str]
    output: Path | None
    batch_size: int


def add_flags(parser: Parser) -> None:
    """Add the flags of `evaluate rewards`."""
    options.add_images(parser)
    options.add_rewards(parser)
    options.add_output(parser)
    options.add_batch_size(parser)


def run(flags: Flags) -> None:
    """Score the images of a folder."""
    from diffalign.cli.output import emit, print_scores, write_result
    from diffalign.cli.rewards import load_usable_rewards
    from diffalign.core import console
    from diffalign.core.errors import UsageError
    from diffalign.data.images import read_folder
    from diffalign.evaluation.folder import (
        check_scored,
        folder_result,
        score_folder,
    )

    if flags.images is None:
        raise UsageError("evaluate rewards needs --images DIR")
    images = read_folder(flags.images)
    reward = load_usable_rewards(flags.rewards, images)
    with console.counting("scores") as progress:
        rows, means = score_folder(
            images, reward.score, batch_size=flags.batch_size, progress=progress
        )
    result = folder_result(flags.images, images, rows, means, reward)
    read = len(rows) - result["unreadable"]
    print_scores(f"{read} of {len(rows)} images in {flags.images}", means, result["intervals"])
    if flags.output is None:
        emit(result)
    else:
        write_result(flags.output, {**result, "scores": rows})
    check_scored(rows, means, reward)


VERB = Verb("rewards", "score the images of a folder with rewards", add_flags, run, flags=Flags)
