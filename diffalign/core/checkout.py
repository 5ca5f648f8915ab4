"""Find the folders of a checkout that are not part of the wheel."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from diffalign.core.errors import UsageError


def require_benchmarks() -> None:
    """Make the package `benchmarks` importable.

    Raises:
        UsageError: diffalign does not run from a checkout that holds the benchmark programs.
    """
    if find_spec("benchmarks") is not None:
        return
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__init__.py").is_file():
        raise UsageError(
            "bench: the benchmark programs are not part of the installed package. "
            "Clone the repository and run `diffalign bench` from an editable install."
        )
    sys.path.insert(0, str(root))
