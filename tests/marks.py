"""Marks of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """Return a case of a test that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def slow_except(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases of a test, all of them marked slow except `fast`.

    `make test` then shows the way on a few cases, `make test-slow` on all others.
    """
    fast = list(fast)
    return [case if case in fast else slow(case) for case in cases]
