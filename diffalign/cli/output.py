"""The output of verbs: tables for people, JSON for programs, and the command to try next."""

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
"""Standard output, while only JSON is written there."""


@contextmanager
def screen(*, json_only: bool) -> Iterator[None]:
    """Send all that is printed to stderr where standard output is for JSON alone."""
    if json_only:
        _programs.append(sys.stdout)
    try:
        with redirect_stdout(console.stderr()) if json_only else nullcontext():
            yield
    finally:
        if json_only:
            _programs.pop()


def emit(result: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON where `--json` asks for it."""
    if _programs:
        print(json.dumps(result), file=_programs[-1], flush=True)


def suggest(*words: object) -> None:
    """Print the command to try next; None among the words is left out."""
    command = shlex.join(["diffalign", *(str(w) for w in words if w is not None)])
    print(f"next: {command}")


def print_scores(
    title: str,
    scores: Mapping[str, float],
    intervals: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Print a table of scores, with the 95 % interval and number of images of those that have one."""
    known = intervals or {}
    rows = []
    for name, value in scores.items():
        found = known.get(name, {})
        rows.append((name, f"{value:.3f}", bounds(found), str(found["n"]) if "n" in found else ""))
    if not known:
        print_table(title, ("", "score"), [[row[:2] for row in rows]])
        return
    print_table(title, ("", "score", "95 % interval", "n"), [rows])


def print_win_rates(title: str, rates: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the share of pairs that are won under each reward; a share within noise is grey."""
    rows = [
        tuple(
            _grey(cell, found["within_noise"])
            for cell in (
                name,
                f"{found['rate']:.3f}",
                bounds(found),
                str(found["pairs"]),
                str(found["ties"]),
                "within noise" if found["within_noise"] else "",
            )
        )
        for name, found in rates.items()
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
    taken = f"{summary['seconds']:.0f} s with its evaluations"
    if resumed:
        print(
            f"training {trained:.0f} s in all sittings; this one, after update {resumed}, {taken}"
        )
    else:
        print(f"training {trained:.0f} s, in all {taken}")


def _change_row(
    name: str, before: float, after: float, change: Mapping[str, Any] | None
) -> tuple[str, ...]:
    row = (name, f"{before:.3f}", f"{after:.3f}")
    if change is None:
        return (*row, f"{after - before:+.3f}", "", "", "")
    noise = change["within_noise"]
    told = (f"{change['value']:+.3f}", bounds(change, sign="+"), str(change["n"]))
    return (*row, *(_grey(t, noise) for t in (*told, "within noise" if noise else "")))


def bounds(found: Mapping[str, Any], *, sign: str = "") -> str:
    """Return the interval of a result as text; empty where there is none."""
    low, high = found.get("low"), found.get("high")
    if low is None or high is None:
        return "unknown" if found else ""
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


def _grey(text: str, is_grey: bool) -> str:
    return f"[dim]{text}[/dim]" if is_grey and text else text


def print_table(
    title: str, columns: Sequence[str], parts: Sequence[Sequence[tuple[str, ...]]]
) -> None:
    """Print a table whose `parts` are separated by lines; columns with a title hold numbers."""
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
    """Write a result as JSON where a file is named, print it with `--json`, and say where it is."""
    emit(result)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=2))
    except OSError as error:
        raise UsageError(f"{path} could not be written: {error}") from error
    print(f"result: {path}")
