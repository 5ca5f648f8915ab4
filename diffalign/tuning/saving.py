"""Results of a search for factors: where they go, how they are saved and described."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.core.errors import UsageError
from diffalign.core.files import folder_aside, write_text
from diffalign.pipelines.cards import DrawingCard
from diffalign.pipelines.registry import available
from diffalign.pipelines.saving import save_pipeline
from diffalign.tuning.tune import TuneResult

RESULT = "qsched.json"


def keeps_earlier(result: TuneResult, pipeline: Any) -> bool:
    """Return whether factors of an earlier search stay in force, because this one accepted none."""
    steps = len(result.best)
    return not result.accepted and not pipeline.scheduler.tables.steps[steps].identity


def target_folder(model: str, output_dir: Path | None) -> tuple[Path, bool]:
    """Return where the factors go, and whether that is a new folder with a copy of the model.

    Raises:
        UsageError: the model has no folder of its own, or the new folder exists.
    """
    named = model in available()  # such a name is no folder, even if there is one of that name
    own = Path(model) if not named and Path(model).is_dir() else None
    target = output_dir or own
    if target is None:
        raise UsageError(
            f"--output_dir: {model} is no folder of yours, so the model with its factors needs one"
        )
    if own is not None and target.resolve() == own.resolve():
        return own, False
    if target.exists():
        raise UsageError(f"--output_dir: {target} exists already")
    return target, True


def save(
    pipeline: Any,
    result: TuneResult,
    folder: Path,
    *,
    whole: bool,
    card: DrawingCard | None = None,
) -> None:
    """The pipeline, or where it lies there already its scheduler's configuration alone: whole or not at all.

    `card`: how the factors were searched, which is how a new folder is drawn with by default.
    """
    if whole:
        with folder_aside(folder) as hidden:
            save_pipeline(pipeline, hidden, card=card)
            result.save(hidden / RESULT)
        return
    text = pipeline.scheduler.to_json_string()
    write_text(folder / "scheduler" / "scheduler_config.json", text)
    result.save(folder / RESULT)


def describe(result: TuneResult, folder: Path, *, kept: bool = False) -> str:
    """A few lines for people, the last of them JSON. `kept`: factors were there before, and stay."""
    low, high = result.interval
    sure = f"95 % interval {low:+.3f}..{high:+.3f}"
    verdict = f"accepted: {result.gain:+.3f} standard deviations on held-out prompts, {sure}"
    if not result.accepted:
        verdict = (
            f"not accepted: held-out prompts see {result.gain:+.3f}, {sure}, which may be nothing; "
            + ("the factors of an earlier search stay" if kept else "the schedule stays as it is")
        )
    lines = [verdict, "step  sample  model_output"]
    pairs = zip(result.best.sample, result.best.model_output, strict=True)
    lines += [f"{i:4}  {a:6.4f}  {b:6.4f}" for i, (a, b) in enumerate(pairs)]
    lines.append(f"{folder}: scheduler/scheduler_config.json and {RESULT}")
    plain = replace(result, history=[]).to_dict()
    del plain["history"]
    return "\n".join([*lines, json.dumps(plain)])
