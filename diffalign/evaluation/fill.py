"""Fill a folder in GenEval's layout with a model's images, all processes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from diffalign.core import processes
from diffalign.core.errors import UsageError
from diffalign.core.versions import versions
from diffalign.data.prompts import Prompt
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
from diffalign.evaluation.score import Progress
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing


def fill_folder(
    folder: Path,
    prompts: Sequence[Prompt],
    load: Callable[[], TextToImageModel],
    drawing: Drawing,
    *,
    made: Mapping[str, Any],
    states: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Draw the images of the prompts that `folder` lacks.

    Args:
        load: loads the model, once the folder has been checked.
        made: how the images are made, as the folder notes it.
        states: record this many sampler states per image.
        progress: told how many of the missing images are drawn.

    Raises:
        GenEvalError: the folder is being filled in another way.
        LockError: another launch is filling it.
        Interrupted: a signal came; the images that are drawn are kept.
    """
    state = processes.current()

    def prepare() -> None:
        claim(folder, made)
        write_prompts(folder, prompts)

    with processes.hold(folder):
        # before the folder is claimed: what the keeper refuses is not noted
        keeper = None if states is None else StateKeeper(load(), drawing, states)
        processes.on_main(prepare)
        generate_samples(
            keeper.model if keeper else load(),
            prompts,
            folder,
            drawing,
            process=(state.process_index, state.num_processes),
            keeper=keeper,
            progress=progress,
        )
        state.wait_for_everyone()


def read_made(folder: Path) -> dict[str, Any]:
    """Return how a folder's images were made, as far as it is noted there."""
    return read_settings(folder) if (folder / SETTINGS).is_file() else {}


def score_filled(
    folder: Path,
    choose_detector: Callable[[Sequence[Mapping[str, Any]]], Any],
    made: Mapping[str, Any],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a folder in GenEval's layout, all processes together, and write `results.jsonl` into it.

    Args:
        choose_detector: returns the `DetectionReward` that looks at images with this metadata.
        made: how the images were made, for the result.

    Returns:
        The result on the main process, an empty dictionary on the others.

    Raises:
        UsageError: the results could not be written.
    """
    state = processes.current()
    images, empty = read_samples(folder)
    detector = choose_detector([i.prompt.metadata for i in images])
    mine = range(state.process_index, len(images), state.num_processes)
    rows = score_samples(
        [images[i] for i in mine],
        detector.detect,
        batch_size=batch_size,
        compat=detector.compat,
        progress=progress,
    )
    rows = sorted(gather_object(rows), key=lambda row: row["filename"])
    if not state.is_main_process:
        return {}
    try:
        write_rows(folder / RESULTS, rows)
    except OSError as error:
        raise UsageError(f"the results could not be written: {error}") from error
    unread = next((row["error"] for row in rows if "error" in row), None)
    return {
        "folder": str(folder),
        **made,
        "detector": vars(detector.card),
        **summary(rows, empty=empty),
        **({} if unread is None else {"first_error": unread}),
        "versions": versions(),
    }
