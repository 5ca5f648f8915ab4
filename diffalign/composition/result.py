"""Files of a composition: the composed folder with its card, the record, the page and the grid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.composition.card import GRID, README, card_text, loading, usage
from diffalign.composition.recipe import GENEVAL
from diffalign.composition.run import RECORD, Composed, Row
from diffalign.core import locks
from diffalign.core.errors import UsageError
from diffalign.core.files import aside, folder_aside, write_text
from diffalign.evaluation.figures import between, number
from diffalign.evaluation.intervals import Difference
from diffalign.evaluation.path import Model, bars, write_path
from diffalign.evaluation.pictures import evenly, labelled_rows, page_image

PAGE, MARK = "report.html", "composition.json"
"""Names of the page, and of the composed folder's file with its digest."""
COLUMNS = 6
"""Images of each model in the grid."""
MIB = 2**20


def write(result: Composed) -> dict[str, Any]:
    """Write all files of a composition, and return its record.

    Raises:
        UsageError: the folder of the composed model holds something else.
    """
    folder = result.plan.folder
    record = result.to_dict()
    with locks.hold(folder):
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
        names, cells = table(result)
        if result.is_made:
            _copy_model(result)
            with aside(result.folder / GRID) as file:
                grid_of(result).save(file)
            write_text(result.folder / README, card_text(result, names, cells))
        _write_page(result, names, cells)
    return record


def _copy_model(result: Composed) -> None:
    """Copy the last good stage's folder, unless the composed folder is a copy of it."""
    target, mark = result.folder, {"digest": result.last.state.digest}
    file = target / MARK
    if target.exists():
        if not file.is_file():
            raise UsageError(
                f"{target} was not created by a composition. Remove it, or choose another folder",
                setting="output_dir",
            )
        if json.loads(file.read_text(encoding="utf-8")) == mark:
            return
    fresh = target.with_name(f"{target.name}-next")
    shutil.rmtree(fresh, ignore_errors=True)
    with folder_aside(fresh) as hidden:
        shutil.copytree(result.last.state.source, hidden, dirs_exist_ok=True)
        (hidden / MARK).write_text(json.dumps(mark), encoding="utf-8")
    # the earlier model stays until the new one is whole
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)


def models(result: Composed) -> list[Row]:
    """Return the rows of the table: all models, and the one that stopped the composition."""
    return [*result.rows, *([] if result.stopped is None else [result.stopped])]


def grid_of(result: Composed) -> Image.Image:
    """Return a picture with a row of same-seed images for each model."""
    rows = models(result)
    places = evenly(range(len(rows[0].measured.evaluation.images)), COLUMNS)
    return labelled_rows(
        {row.name: row.measured.evaluation.images[places] for row in rows},
        _captions(rows[0], places),
    )


def _captions(row: Row, places: list[int]) -> list[str]:
    """Return the prompt of each stored image."""
    evaluation = row.measured.evaluation
    numbers = evaluation.rows or tuple(range(len(evaluation.prompts)))
    return [evaluation.texts[numbers[place]] for place in places]


def table(result: Composed) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of stages."""
    rows = models(result)
    cells = [_cells(row) for row in rows]
    names = [name for name in cells[0] | cells[-1] if any(c.get(name) for c in cells)]
    return ["model", *names], [
        [row.name, *(c.get(name, "") for name in names)] for row, c in zip(rows, cells, strict=True)
    ]


def _cells(row: Row) -> dict[str, str]:
    """Return the cells of a model by column."""
    figures, tasks = row.measured.figures, row.measured.evaluation.intervals()
    cells = {}
    if row.measured.geneval is not None:
        estimate = tasks["tasks"].get("overall")
        bounds = "" if estimate is None else f" ({between(estimate.low, estimate.high)})"
        cells["GenEval"] = number(row.measured.geneval) + bounds
        cells["to base"] = _change(row.to_base.get(GENEVAL))
        cells["to before"] = _change(row.to_before.get(GENEVAL))
    for name, value in row.measured.evaluation.means.items():
        if "/" not in name and name != "reward":
            cells[name] = number(value)
            cells[f"{name} to base"] = _change(row.to_base.get(name))
    for name, title in (("fid", "FID"), ("cmmd", "CMMD")):
        cells[title] = number(figures[name]) if figures.get(name) is not None else ""
    cells["PSNR to before"] = "" if row.psnr is None else f"{row.psnr:.1f} dB"
    cells["steps"] = str(figures["steps"])
    cells["tokens"] = f"{figures['tokens']} + {figures['text_tokens']}"
    cells["s an image"] = number(figures["seconds"])
    cells["of them denoising"] = number(figures["denoise_seconds"])
    cells["times as fast"] = f"{figures['speedup']:.2f}" if "speedup" in figures else ""
    cells["denoiser MiB"] = number(figures["bytes"] / MIB)
    cells["all MiB"] = number(figures["all_bytes"] / MIB)
    return cells


def short_table(result: Composed) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return columns and rows of the table for a terminal, without intervals."""
    names = ["", "GenEval", "FID", "PSNR", "steps", "tokens", "s", "times", "MiB"]
    rows = []
    for row in models(result):
        f = row.measured.figures
        cells = (
            row.name,
            "" if row.measured.geneval is None else number(row.measured.geneval),
            "" if f.get("fid") is None else number(f["fid"]),
            "" if row.psnr is None else f"{row.psnr:.1f}",
            str(f["steps"]),
            str(f["tokens"]),
            number(f["seconds"]),
            f"{f['speedup']:.2f}" if "speedup" in f else "",
            number(f["bytes"] / MIB),
        )
        rows.append(cells)
    used = [i for i, name in enumerate(names) if not name or any(r[i] for r in rows)]
    return [names[i] for i in used], [tuple(row[i] for i in used) for row in rows]


def _change(change: Difference | None) -> str:
    """Return a difference with its interval."""
    if change is None:
        return ""
    return f"{number(change.value, sign=True)} ({between(change.low, change.high, sign=True)})"


def lead(result: Composed) -> str:
    """Return the result in a sentence or two."""
    base, last = result.base.measured, result.last.measured
    words = []
    if "speedup" in last.figures:
        words.append(f"{last.figures['speedup']:.2f} times as fast as the base")
    words.append(f"{base.figures['bytes'] / last.figures['bytes']:.2f} times smaller")
    if base.geneval is not None and last.geneval is not None:
        words.append(f"GenEval {number(base.geneval)} to {number(last.geneval)}")
    if "fid" in base.figures:
        words.append(f"FID {number(base.figures['fid'])} to {number(last.figures['fid'])}")
    text = f"{len(result.rows) - 1} stages: {', '.join(words)}."
    if result.stopped is not None:
        text += f" Stopped at {result.stopped.title}: {'; '.join(result.stopped.failures)}."
    return text


def _write_page(result: Composed, names: list[str], cells: list[list[str]]) -> None:
    rows = models(result)
    places = evenly(range(len(rows[0].measured.evaluation.images)), COLUMNS)
    on_page = [
        Model(
            row.name,
            "base" if row is rows[0] else "stopped" if row.failures else "good",
            dict(zip(names, texts, strict=True)),
            [
                page_image(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
                for image in row.measured.evaluation.images[places]
            ],
            [f"{text}." for text in row.failures],
        )
        for row, texts in zip(rows, cells, strict=True)
    ]
    recipe = result.plan.recipe
    write_path(
        result.plan.folder / PAGE,
        on_page,
        title=f"{recipe.model}, composed",
        lead=lead(result),
        columns=names,
        charts=_charts(rows),
        captions=_captions(rows[0], places),
        more={
            "usage": usage(result.folder, result.last)
            if result.is_made
            else ["# no stage was kept"],
            "facts": [
                *(loading(result.folder) if result.is_made else []),
                "A time is the median over single images, drawn in turns with the base's where both fit into memory.",
            ],
        },
    )


def _charts(rows: list[Row]) -> list[Any]:
    """Return the bars of the figures that all models have."""

    def values(name: str) -> dict[str, float | None]:
        return {row.name: row.measured.figures.get(name) for row in rows}

    return [
        bars("GenEval", {row.name: row.measured.geneval for row in rows}),
        bars("FID", values("fid")),
        bars("seconds of an image", values("seconds")),
        bars("bytes of the denoiser", values("bytes")),
        bars("image tokens", values("tokens")),
    ]


def headline(result: Composed) -> dict[str, Any]:
    """Return the figures of the base and of the composed model."""
    base, last = result.base.measured, result.last.measured
    figures: dict[str, Any] = {
        "speedup": last.figures.get("speedup"),
        "bytes_ratio": base.figures["bytes"] / last.figures["bytes"],
    }
    for name, value in (("base", base), ("composed", last)):
        figures[f"geneval_{name}"] = value.geneval
        figures[f"fid_{name}"] = value.figures.get("fid")
    return {**figures, "model": str(result.folder) if result.is_made else None}


def page(result: Composed) -> Path:
    """Return the path of the page."""
    return result.plan.folder / PAGE
