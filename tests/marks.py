"""Marks of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases of a test, all of them marked slow except `fast`.

    `make test` then shows the way on a few cases, `make test-slow` on all others.
    """
    fast = list(fast)
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
