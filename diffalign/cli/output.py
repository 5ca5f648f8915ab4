"""Output of verbs: tables for people, JSON for programs, and a suggested next command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from diffalign.core import console
from diffalign.core.errors import UsageError
from diffalign.core.files import write_text

_programs: list[TextIO] = []
"""Standard output stream while it is reserved for JSON; else empty."""


@contextmanager
def screen(*, json_only: bool) -> Iterator[None]:
    """Redirect printed text to stderr if standard output is reserved for JSON."""
    if json_only:
        _programs.append(sys.stdout)
    try:
        with redirect_stdout(console.stderr()) if json_only else nullcontext():
            yield
    finally:
        if json_only:
            _programs.pop()


def emit(result: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON if --json is set."""
    if _programs:
        print(json.dumps(result), file=_programs[-1], flush=True)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def suggest(*words: object) -> None:
    """Print a command to run next, made of all words but None."""
    command = shlex.join(["diffalign", *(str(w) for w in words if w is not None)])
    print(f"next: {command}")


def print_scores(
    title: str,
    scores: Mapping[str, float],
    intervals: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Print a table of scores; `intervals` adds 95 % intervals and numbers of images."""
    by_name = intervals or {}
    rows = []
    for name, value in scores.items():
        interval = by_name.get(name, {})
        count = str(interval["n"]) if "n" in interval else ""
        rows.append((name, f"{value:.3f}", bounds(interval), count))
    if not by_name:
        print_table(title, ("", "score"), [[row[:2] for row in rows]])
        return
    print_table(title, ("", "score", "95 % interval", "n"), [rows])


def print_win_rates(title: str, rates: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the share of pairs won under each reward; a share within noise is grey."""
    rows = [
        tuple(
            _grey(cell, rate["within_noise"])
            for cell in (
                name,
                f"{rate['rate']:.3f}",
                bounds(rate),
                str(rate["pairs"]),
                str(rate["ties"]),
                "within noise" if rate["within_noise"] else "",
            )
        )
        for name, rate in rates.items()
    ]
    print_table(title, ("", "pairs won", "95 % interval", "pairs", "ties", " "), [rows])


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print both evaluations of a run side by side; a change within noise is grey."""
    parts = []
    for part in ("tasks", "means"):
        after, before = summary["after"][part], summary["before"][part]
        changes = summary.get("differences", {}).get(part, {})
        parts.append(
            [
                _change_row(name, before[name], after[name], changes.get(name))
                for name in after
                if name in before
            ]
        )
    title = f"held-out prompts, {summary['updates']} updates on {summary['device']}"
    print_table(title, ("", "before", "after", "change", "95 % interval", "n", " "), parts)
    trained, resumed = summary["training_seconds"], summary.get("resumed_after", 0)
    total = f"{summary['seconds']:.0f} s with its evaluations"
    if resumed:
        print(
            f"training {trained:.0f} s in all sittings; this one, after update {resumed}, {total}"
        )
    else:
        print(f"training {trained:.0f} s, in all {total}")


def _change_row(
    name: str, before: float, after: float, change: Mapping[str, Any] | None
) -> tuple[str, ...]:
    row = (name, f"{before:.3f}", f"{after:.3f}")
    if change is None:
        return (*row, f"{after - before:+.3f}", "", "", "")
    noise = change["within_noise"]
    cells = (f"{change['value']:+.3f}", bounds(change, sign="+"), str(change["n"]))
    return (*row, *(_grey(t, noise) for t in (*cells, "within noise" if noise else "")))


def bounds(interval: Mapping[str, Any], *, sign: str = "") -> str:
    """Return an interval as text: "unknown" without bounds, empty for an empty mapping."""
    low, high = interval.get("low"), interval.get("high")
    if low is None or high is None:
        return "unknown" if interval else ""
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


def _grey(text: str, is_grey: bool) -> str:
    return f"[dim]{text}[/dim]" if is_grey and text else text


def print_table(
    title: str, columns: Sequence[str], parts: Sequence[Sequence[tuple[str, ...]]]
) -> None:
    """Print a table whose `parts` are separated by lines.

    Columns with a title hold numbers and are aligned to the right.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column.strip(), justify="right" if column.strip() else "left")
    for rows in parts:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    Console().print(table)


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """Print a result with --json, and write it to `path` as JSON, if set."""
    emit(result)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=2))
    except OSError as error:
        raise UsageError(f"{path} could not be written: {error}") from error
    print(f"result: {path}")
