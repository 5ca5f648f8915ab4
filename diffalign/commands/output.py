"""What verbs print and write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_scores(title: str, scores: Mapping[str, float]) -> None:
    """A table for people."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("score", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """A file for programs, where one is wanted."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2), encoding="utf-8")
