"""Page of a path of models: a table, bars, and a grid with one row for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.core.files import write_text
from diffalign.evaluation.figures import number
from diffalign.evaluation.intervals import NOTE
from diffalign.evaluation.pictures import PageImage
from diffalign.evaluation.report import render_page


@dataclass(frozen=True)
class Model:
    """Model on the path: its cells by column, its images, and notes in whole sentences.

    The `kind` is "base", "good" or "stopped".
    """

    name: str
    kind: str
    cells: Mapping[str, str]
    images: Sequence[PageImage]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Bars:
    """Horizontal bars of one figure: a name, the value as text, and the width in percent."""

    title: str
    bars: list[tuple[str, str, float]]


def bars(title: str, values: Mapping[str, float | None]) -> Bars | None:
    """Return the bars of a figure of several models.

    Return None if fewer than two models have the figure.
    """
    measured = {name: value for name, value in values.items() if value is not None}
    if len(measured) < 2:
        return None
    largest = max(map(abs, measured.values())) or 1.0
    return Bars(
        title, [(n, number(v), round(100 * abs(v) / largest, 1)) for n, v in measured.items()]
    )


def write_path(
    file: Path,
    models: Sequence[Model],
    *,
    title: str,
    lead: str,
    columns: Sequence[str],
    charts: Sequence[Bars | None],
    captions: Sequence[str],
    more: Mapping[str, Any],
) -> None:
    """Write the page of a path.

    Args:
        models: models in their order, the base first.
        title: title of the page.
        lead: result in a sentence or two.
        columns: columns of the table.
        charts: bars of each figure; None is left out.
        captions: prompt of each image of a model.
        more: `usage` (lines of code) and `facts` (sentences about the measurement).
    """
    page = render_page(
        "path.html",
        models=models,
        title=title,
        lead=lead,
        columns=columns,
        charts=[chart for chart in charts if chart is not None],
        captions=captions,
        note=NOTE,
        **more,
    )
    write_text(file, page)
