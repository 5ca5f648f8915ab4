"""Front of time and quality: a scatter of measured points as SVG, a page, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffalign.core.files import aside, write_text
from diffalign.evaluation.charts import Tick, label, ticks
from diffalign.evaluation.report import render_page

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 12, 40
"""Margins for the labels of the axes."""


@dataclass(frozen=True)
class Mark:
    """Point of a scatter.

    Attributes:
        name: name of the point.
        x: value on the horizontal axis.
        y: value on the vertical axis.
        kind: "plain", "front", "chosen" or "other".
    """

    name: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Scatter:
    """Scatter ready for the page: marks in pixels, ticks, and the line through the front."""

    marks: list[Mark]
    line: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    y_label: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def scatter(marks: Sequence[Mark], *, x_label: str, y_label: str) -> Scatter:
    """Return the scatter of at least one mark.

    Marks of the front are joined from left to right.
    """
    x_ticks = ticks(0.0, max(m.x for m in marks))
    y_ticks = ticks(min(m.y for m in marks), max(m.y for m in marks))

    def across(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    placed = [Mark(m.name, across(m.x), down(m.y), m.kind) for m in marks]
    joined = sorted((m for m in placed if m.kind != "other"), key=lambda m: m.x)
    return Scatter(
        placed,
        " ".join(f"{m.x:.1f},{m.y:.1f}" for m in joined),
        [Tick(across(v), label(v, x_ticks)) for v in x_ticks],
        [Tick(down(v), label(v, y_ticks)) for v in y_ticks],
        x_label,
        y_label,
    )


def write_front(
    file: Path,
    chart: Scatter,
    *,
    title: str,
    lead: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    usage: Sequence[str],
    facts: Sequence[str],
) -> None:
    """Write the page of a front.

    Args:
        chart: scatter of all points.
        title: title of the page.
        lead: result in a sentence or two.
        rows: cells of each point by column, with its `kind`; a cell that is missing is empty.
        columns: columns of the table; the first holds names.
        usage: lines of code that use the result.
        facts: sentences about the measurement.
    """
    page = render_page(
        "front.html",
        title=title,
        lead=lead,
        chart=chart,
        rows=rows,
        columns=columns,
        usage=usage,
        facts=facts,
    )
    write_text(file, page)


def draw_front(file: Path, marks: Sequence[Mark], *, x_label: str, y_label: str) -> bool:
    """Draw a scatter as a picture. Return False without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    looks = {
        "other": ("0.7", "o"),
        "front": ("C0", "o"),
        "plain": ("k", "s"),
        "chosen": ("C3", "*"),
    }
    for kind, (colour, marker) in looks.items():
        of_kind = [m for m in marks if m.kind == kind]
        size = 160 if kind == "chosen" else 24
        if of_kind:
            places = [m.x for m in of_kind], [m.y for m in of_kind]
            axes.scatter(*places, c=colour, marker=marker, s=size, label=kind, zorder=2)
    joined = sorted((m for m in marks if m.kind != "other"), key=lambda m: m.x)
    axes.plot([m.x for m in joined], [m.y for m in joined], color="C0", linewidth=1, zorder=1)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_xlim(left=0)
    axes.legend()
    with aside(file) as hidden:
        figure.savefig(hidden)
    return True
