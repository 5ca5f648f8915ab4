"""The sides of a comparison page: folders of images, with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.core.errors import UsageError
from diffalign.data.images import read_folder
from diffalign.evaluation.comparison import CORRECT, Compared, read_geneval
from diffalign.evaluation.folder import check_captions, counts, score_folder
from diffalign.evaluation.preference import by_name


def read_sides(
    folders: Sequence[tuple[str, Path]], reward: Any | None, *, batch_size: int
) -> list[Compared]:
    """Read folders with their names, and score their images if a reward is given.

    Raises:
        UsageError: two sides have the same name, or a reward cannot judge the images.
    """
    sides = []
    for name, folder in folders:
        images = read_folder(folder, setting="folders")
        named = by_name(images, folder)
        geneval, correct = read_geneval(folder, images)
        means: dict[str, float] = {}
        scored: dict[str, dict[str, int]] = {}
        values: dict[str, dict[str, float]] = {CORRECT: correct} if correct else {}
        if reward is not None:
            reward.check_metadata([i.prompt.metadata for i in images])
            check_captions(reward, images, folder)
            rows, scores = score_folder(images, reward.score, batch_size=batch_size)
            scored = counts(rows, reward.rewards)
            means = {n: scores[n] for n in reward.rewards if n in scores}
            for n in means:
                values[n] = {
                    image.path.relative_to(folder).as_posix(): row[n]
                    for image, row in zip(images, rows, strict=True)
                    if row.get(n) is not None
                }
        sides.append(Compared(name, folder, named, geneval, means, scored, values))
    names = [s.name for s in sides]
    if len(set(names)) < len(names):
        raise UsageError(
            f"two are called the same ({', '.join(names)}); name them, as in NAME=DIR",
            setting="folders",
        )
    return sides
