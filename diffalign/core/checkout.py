"""Find the folders of a checkout that are not part of the wheel."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffalign.core.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
"""Root of the checkout, if diffalign runs from one."""


def read_result(name: str) -> dict[str, Any] | None:
    """Return the record of a benchmark in full.

    Return None if there is none, if it was a quick one, or if diffalign does not run from a checkout.
    """
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return None if record.get("quick") else record


def require_benchmarks() -> None:
    """Make the package `benchmarks` importable.

    Raises:
        UsageError: diffalign does not run from a checkout that holds the benchmark programs.
    """
    if find_spec("benchmarks") is not None:
        return
    if not (ROOT / "benchmarks" / "__init__.py").is_file():
        raise UsageError(
            "bench: the benchmark programs are not part of the installed package. "
            "Clone the repository and run `diffalign bench` from an editable install."
        )
    sys.path.insert(0, str(ROOT))
