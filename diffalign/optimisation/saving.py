"""Files and texts of a search's result: the plan, the figures, the page, and what to run next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.core.errors import UserError
from diffalign.core.files import write_text
from diffalign.core.versions import versions
from diffalign.evaluation.figures import between, number
from diffalign.evaluation.front import Mark, draw_front, scatter, write_front
from diffalign.optimisation.limits import PSNR
from diffalign.optimisation.run import Optimised
from diffalign.optimisation.search import Point

RESULT, PAGE, PICTURE = "optimise.json", "front.html", "front.png"
X_LABEL, Y_LABEL = "seconds of a call", "PSNR in dB"
SHOWN = 100.0
"""PSNR in dB above which a chart shows this value."""
FACTS = (
    "A time is the plain pipeline's, divided by the median ratio over pairs of calls whose order alternates.",
    "Intervals are 95 % intervals of a paired bootstrap over prompts.",
    "A point is accepted if the intervals on held-out prompts lie above all limits.",
)


class NotReached(UserError, RuntimeError):
    """Limits that no measured point keeps."""

    exit_code = 1


def write(result: Optimised, folder: Path, *, model: str) -> dict[str, Any]:
    """Write a result's files, and return its record.

    The files are the plan, the record as JSON, the page and the picture. A plan of an earlier search is removed if no
    point was accepted now.
    """
    record = to_dict(result, model=model)
    folder.mkdir(parents=True, exist_ok=True)
    if result.plan is not None:
        result.plan.save(folder)
    else:
        from diffalign.acceleration.report import PLAN

        (folder / PLAN).unlink(missing_ok=True)
    write_text(folder / RESULT, json.dumps(record, indent=1) + "\n")
    marks = _marks(result)
    draw_front(folder / PICTURE, marks, x_label=X_LABEL, y_label=Y_LABEL)
    write_front(
        folder / PAGE,
        scatter(marks, x_label=X_LABEL, y_label=Y_LABEL),
        title=f"{model} on {result.machine['device']}: time and quality",
        lead=verdict(result),
        rows=rows(result),
        columns=columns(result),
        usage=usage(result, folder, model=model),
        facts=[*FACTS, f"The measurements took {result.seconds / 60:.1f} minutes."],
    )
    return record


def to_dict(result: Optimised, *, model: str) -> dict[str, Any]:
    """Return the result as JSON values."""
    steps = result.call.steps
    tested = {p.candidate: p for p in result.tested}
    points = [tested.get(p.candidate, p) for p in result.points]
    front = [result.name(p) for p in result.front]
    return {
        "model": model,
        "limits": str(result.limits),
        "plain": result.plain.to_dict(steps),
        "points": [p.to_dict(steps) for p in points],
        "front": front,
        "chosen": None if result.choice is None else result.choice.to_dict(steps),
        "nearest": result.nearest.to_dict(steps),
        "tested": [result.name(p) for p in result.tested],
        "images": dict(result.images),
        "steps": steps,
        "size": [result.call.height, result.call.width],
        "arguments": dict(result.call.arguments),
        "seed": result.call.seed,
        "seconds": round(result.seconds, 1),
        "machine": dict(result.machine),
        "versions": versions(),
    }


def verdict(result: Optimised) -> str:
    """Return the result in a sentence or two."""
    if result.choice is not None:
        return f"Chosen: {described(result, result.choice)}. It keeps {result.limits}."
    return f"No point keeps {result.limits}. The nearest is {described(result, result.nearest)}."


def described(result: Optimised, point: Point) -> str:
    """Return a point with its figures in words."""
    text = (
        f"{result.name(point)}, {number(point.latency)} s a call ({point.ratio:.2f} times as fast)"
    )
    if result.limits.memory is not None and point.memory is not None:
        text += f", {point.memory / 2**30:.3g} GiB"
    text += f", {point.psnr:.1f} dB"
    for name, v in (point.held_out or point.verdicts).items():
        where = "held-out" if point.held_out else "search"
        bounds = between(v.estimate.low, v.estimate.high, sign=name != PSNR)
        text += (
            f", {name} {number(v.estimate.value, sign=name != PSNR)} on {where} prompts ({bounds})"
        )
    return text


def not_reached(result: Optimised) -> NotReached:
    """Return the error for limits that no point keeps.

    It names the nearest point and what to change.
    """
    hints = []
    sound = [p for p in result.points[1:] if p.viable]
    if result.limits.latency is not None and sound:
        fastest = min(sound, key=lambda p: p.latency)
        hints.append(
            f"the fastest point that may keep the quality takes {number(fastest.latency)} s"
        )
    least = [p.memory for p in sound if p.memory is not None]
    if result.limits.memory is not None and least:
        hints.append(f"the least memory is {min(least) / 2**30:.3g} GiB")
    hint = f" ({'; '.join(hints)})" if hints else ""
    return NotReached(
        f"no point keeps {result.limits}. The nearest is {described(result, result.nearest)}. Widen the `budget` "
        f"or the `quality`{hint}, or give more images (`images_per_prompt`) if only the intervals are too wide."
    )


def usage(result: Optimised, folder: Path, *, model: str) -> list[str]:
    """Return lines of Python that use the plan."""
    if result.choice is None:
        return ["# no plan was accepted"]
    arguments = "".join(f", {name}={value!r}" for name, value in result.call.arguments.items())
    size = f"height={result.call.height}, width={result.call.width}"
    return [
        f"pipe = diffalign.accelerate(diffalign.load({model!r}), {str(folder)!r})",
        f"pipe(prompt, num_inference_steps={result.choice.candidate.steps}, {size}{arguments})",
    ]


def columns(result: Optimised) -> list[str]:
    """Return the columns of the table of points."""
    memory = ["GiB"] if result.limits.memory is not None else []
    names = [PSNR, *result.limits.differences]
    return ["", "seconds", "ratio", *memory, *names, "held-out prompts"]


def rows(result: Optimised) -> list[dict[str, str]]:
    """Return the cells of the table of points: of the front, of the others, and of those left out."""
    front = {p.candidate: p for p in result.front}
    others = [p for p in result.points if p.candidate not in front]
    sound = [p for p in others if p.problem is None]
    left_out = [p for p in others if p.problem is not None]
    cells = []
    for point in [*front.values(), *sorted(sound, key=lambda p: p.latency)]:
        row = {
            "": result.name(point),
            "kind": _kind(result, point),
            "seconds": number(point.latency),
            "ratio": f"{point.ratio:.2f}",
            PSNR: f"{point.psnr:.1f}",
            "held-out prompts": _tested(point),
        }
        if point.memory is not None:
            row["GiB"] = f"{point.memory / 2**30:.3g}"
        for name, v in point.verdicts.items():
            if name != PSNR:
                row[name] = number(v.estimate.value, sign=True)
        cells.append(row)
    return [
        *cells,
        *({"": f"{result.name(p)}: left out, {p.problem}", "kind": "other"} for p in left_out),
    ]


def table(result: Optimised) -> tuple[list[str], list[list[tuple[str, ...]]]]:
    """Return columns and parts of the table for a terminal: the front alone."""
    names = columns(result)
    shown = [row for row in rows(result) if row["kind"] != "other"]
    return names, [[tuple(row.get(c, "") for c in names) for row in shown]]


def _tested(point: Point) -> str:
    if not point.held_out:
        return ""
    return "accepted" if point.accepted else "not accepted"


def _kind(result: Optimised, point: Point) -> str:
    if result.choice is not None and point.candidate == result.choice.candidate:
        return "chosen"
    if point.candidate == result.plain.candidate:
        return "plain"
    return "front" if any(p.candidate == point.candidate for p in result.front) else "other"


def _marks(result: Optimised) -> Sequence[Mark]:
    sound = [p for p in result.points if p.problem is None]
    return [Mark(result.name(p), p.latency, min(p.psnr, SHOWN), _kind(result, p)) for p in sound]
