"""What verbs print and write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.core.errors import UsageError
from diffalign.core.files import write_text


def print_scores(title: str, scores: Mapping[str, float]) -> None:
    """Print a table of scores."""
    _print_table(title, ("", "score"), [[(n, f"{value:.3f}") for n, value in scores.items()]])


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print both evaluations of a run side by side."""
    parts = []
    for part in ("tasks", "means"):
        after, before = summary["after"][part], summary["before"][part]
        parts.append([(n, f"{before[n]:.3f}", f"{after[n]:.3f}") for n in after if n in before])
    title = f"held-out prompts, {summary['updates']} updates on {summary['device']}"
    _print_table(title, ("", "before", "after"), parts)
    trained, resumed = summary["training_seconds"], summary.get("resumed_after", 0)
    taken = f"{summary['seconds']:.0f} s with its evaluations"
    if resumed:
        print(
            f"training {trained:.0f} s in all sittings; this one, after update {resumed}, {taken}"
        )
    else:
        print(f"training {trained:.0f} s, in all {taken}")


def _print_table(
    title: str, columns: Sequence[str], parts: Sequence[Sequence[tuple[str, ...]]]
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for rows in parts:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    Console().print(table)


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON where a file is named."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=2))
    except OSError as error:
        raise UsageError(f"{path} could not be written: {error}") from error
