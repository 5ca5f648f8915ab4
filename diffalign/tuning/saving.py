"""Results of a search for factors: target folder, saving and description."""

from __future__ import annotations

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
    """Return whether an earlier search's factors stay because this one accepted none."""
    steps = len(result.best)
    return not result.accepted and not pipeline.scheduler.tables.steps[steps].identity


def target_folder(model: str, output_dir: Path | None) -> tuple[Path, bool]:
    """Return the folder for the factors and whether it is a new copy."""
    # A model's name has precedence over a folder of the same name.
    is_named = model in available()
    own = Path(model) if not is_named and Path(model).is_dir() else None
    target = output_dir or own
    if target is None:
        raise UsageError(f"output_dir must be given, because {model} is not a local folder.")
    if own is not None and target.resolve() == own.resolve():
        return own, False
    if target.exists():
        raise UsageError(f"output_dir={target} exists already. Choose another folder.")
    return target, True


def save(
    pipeline: Any,
    result: TuneResult,
    folder: Path,
    *,
    whole: bool,
    card: DrawingCard | None = None,
) -> None:
    """Save the factors, atomically.

    Args:
        pipeline: pipeline whose scheduler has the factors.
        result: result of the search.
        folder: target folder.
        whole: whether to save the whole pipeline; otherwise only the scheduler's configuration is written.
        card: sampling settings of the search, which become the defaults of a new folder.
    """
    if whole:
        with folder_aside(folder) as hidden:
            save_pipeline(pipeline, hidden, card=card)
            result.save(hidden / RESULT)
        return
    text = pipeline.scheduler.to_json_string()
    write_text(folder / "scheduler" / "scheduler_config.json", text)
    result.save(folder / RESULT)


def describe(result: TuneResult, folder: Path, *, keeps_earlier: bool = False) -> str:
    """Return a few lines about the result: the verdict, the factors in force, and the files.

    Args:
        result: result of the search.
        folder: folder of the factors.
        keeps_earlier: whether the factors of an earlier search stay.
    """
    low, high = result.interval
    interval = f"95 % interval {low:+.3f}..{high:+.3f}"
    verdict = f"accepted: {result.gain:+.3f} standard deviations on held-out prompts, {interval}"
    if not result.accepted:
        verdict = (
            f"not accepted: {result.gain:+.3f} on held-out prompts, {interval}, which includes no gain; "
            + (
                "the factors of an earlier search stay"
                if keeps_earlier
                else "the schedule stays as it is"
            )
        )
    if not result.accepted:
        return f"{verdict}\n{folder}: {RESULT} tells of the search, no factors were written"
    lines = [verdict, "step  sample  model_output"]
    pairs = zip(result.best.sample, result.best.model_output, strict=True)
    lines += [f"{i:4}  {a:6.4f}  {b:6.4f}" for i, (a, b) in enumerate(pairs)]
    return "\n".join([*lines, f"{folder}: scheduler/scheduler_config.json and {RESULT}"])
