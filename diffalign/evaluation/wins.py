"""Win rates of one folder of images against another, by rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.core.versions import versions
from diffalign.data.images import read_folder
from diffalign.evaluation.folder import check_captions, column, counts, score_folder
from diffalign.evaluation.preference import by_name, shared_names, win_rate
from diffalign.evaluation.score import Progress


def compare_folders(
    images: Path,
    against: Path,
    load_rewards: Callable[[Sequence[Mapping[str, Any]]], Any],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], str | None]:
    """Return win rates of `images` over `against`, and the rewards' last error.

    Images of the same name are compared. The function `load_rewards` returns the `CompositeReward` for prompts with
    this metadata.
    """
    folders = (images, against)
    sets = [
        by_name(read_folder(folder, setting=name), folder)
        for folder, name in zip(folders, ("images", "against"), strict=True)
    ]
    pairs = shared_names(sets)
    images_of = [[images[name] for name in pairs] for images in sets]
    reward = load_rewards([i.prompt.metadata for i in images_of[0]])
    check_captions(reward, images_of[0], images)

    def score_side(number: int) -> list[dict[str, Any]]:
        def advance(done: int, count: int) -> None:
            if progress is not None:
                progress(number * count + done, 2 * count)

        side = images_of[number]
        return score_folder(side, reward.score, batch_size=batch_size, progress=advance)[0]

    rows = [score_side(0), score_side(1)]
    prompts = [image.prompt.text or str(i) for i, image in enumerate(images_of[0])]
    rates: dict[str, Any] = {}
    for name in reward.rewards:
        a, b = (column(side, name) for side in rows)
        rate = win_rate(a, b, prompts)
        rates[name] = None if rate is None else rate.to_dict()
    result = {
        "images": str(images),
        "against": str(against),
        "pairs": len(pairs),
        "without_partner": sum(map(len, sets)) - 2 * len(pairs),
        "unreadable": sum("error" in r for side in rows for r in side),
        "counts": {
            str(folder): counts(side, reward.rewards)
            for folder, side in zip(folders, rows, strict=True)
        },
        "win_rate": rates,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        "versions": versions(),
    }
    return result, reward.last_error
