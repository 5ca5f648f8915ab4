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
    from diffalign.evaluation.figures import between, number

    by_name = intervals or {}
    rows = []
    for name, value in scores.items():
        interval = by_name.get(name, {})
        bounds = between(interval.get("low"), interval.get("high")) if interval else ""
        rows.append((name, number(value), bounds, str(interval.get("n", ""))))
    if not by_name:
        print_table(title, ("", "score"), [[row[:2] for row in rows]])
        return
    print_table(title, ("", "score", "95 % interval", "n"), [rows])


def print_evaluation(title: str, evaluation: Mapping[str, Any]) -> None:
    """Print the tasks and means of an evaluation, each quantity once."""
    from diffalign.evaluation.figures import score_rows

    scores: dict[str, float] = {}
    intervals: dict[str, Mapping[str, Any]] = {}
    for part, titles in score_rows([evaluation]).items():
        for name, row in titles.items():
            scores[row] = evaluation[part][name]
            intervals[row] = evaluation["intervals"].get(part, {}).get(name, {})
    print_scores(title, scores, intervals)


def print_win_rates(title: str, rates: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the share of pairs won under each reward; a share within noise is grey."""
    from diffalign.evaluation.figures import number, told

    rows = []
    for name, rate in rates.items():
        n, prompts = rate["pairs"], rate["prompts"]
        interval, noise = told(rate["low"], rate["high"], n=n, prompts=prompts, centre=0.5)
        cells = (name, number(rate["rate"]), interval, str(n), str(rate["ties"]), noise)
        rows.append(tuple(_grey(cell, rate["within_noise"]) for cell in cells))
    print_table(title, ("", "pairs won", "95 % interval", "pairs", "ties", " "), [rows])


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print both evaluations of a run side by side; a change within noise is grey."""
    from diffalign.evaluation.figures import score_rows, times_told

    before, after = summary["before"], summary["after"]
    parts = []
    for part, titles in score_rows([before, after]).items():
        changes = summary.get("differences", {}).get(part, {})
        parts.append(
            [
                _change_row(row, before[part][name], after[part][name], changes.get(name))
                for name, row in titles.items()
            ]
        )
    title = f"held-out prompts, {summary['updates']} updates on {summary['device']}"
    print_table(title, ("", "before", "after", "change", "95 % interval", "n", " "), parts)
    if any(row[-1] for rows in parts for row in rows):
        print("noise: the interval holds 0; the change is within noise")
    print(times_told(summary))


def _change_row(
    name: str, before: float, after: float, change: Mapping[str, Any] | None
) -> tuple[str, ...]:
    from diffalign.evaluation.figures import number, told

    row = (name, number(before), number(after))
    if change is None:
        return (*row, number(after - before, sign=True), "", "", "")
    interval, noise = told(change["low"], change["high"], n=change["n"], prompts=change["prompts"])
    cells = (number(change["value"], sign=True), interval, str(change["n"]), noise and "noise")
    return (*row, *(_grey(cell, change["within_noise"]) for cell in cells))


def _grey(text: str, is_grey: bool) -> str:
    return f"[dim]{text}[/dim]" if is_grey and text else text


def print_table(
    title: str, columns: Sequence[str], parts: Sequence[Sequence[tuple[str, ...]]]
) -> None:
    """Print a table whose `parts` are separated by lines.

    Columns with a title hold numbers and are aligned to the right.
    """
    from rich.box import SIMPLE_HEAVY
    from rich.console import Console
    from rich.table import Table

    # 80 columns hold all numbers unbroken; names take several lines where they must
    table = Table(title=title, box=SIMPLE_HEAVY, pad_edge=False, collapse_padding=True)
    for column in columns:
        numbers = bool(column.strip())
        table.add_column(
            column.strip(),
            justify="right" if numbers else "left",
            no_wrap=column != "",
            overflow="fold",
        )
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
        raise UsageError(f"{path} could not be written: {error}. Choose another file") from error
    print(f"result: {path}")
