"""Paired comparison of two suites: the same prompts, seeds, judge and rule, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.core.text import read_json
from diffalign.evaluation.suite.base import Benchmark, SuiteError
from diffalign.evaluation.suite.run import RESULT, ROWS, read_rows
from diffalign.evaluation.suite.summarize import differences

SAME = {
    "variant": "rule",
    "judges": "judge",
    "questions_digest": "questions",
    "prompts_digest": "prompts",
}
"""Fields of two results that must be equal, and what they are."""
DRAWN = ("seed", "num_inference_steps", "guidance_scale", "height", "width")


def read_result(folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Return the result of a benchmark in a suite's folder.

    Raises:
        SuiteError: the folder has no such result.
    """
    file = folder / benchmark.folder / RESULT
    if not file.is_file():
        raise SuiteError(
            f"{folder} has no result of {benchmark.name}. Run the suite there first, or name another folder"
        )
    result: dict[str, Any] = read_json(file, error=SuiteError)
    return result


def compare(folder: Path, against: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Return the paired differences of all figures to another suite.

    Raises:
        SuiteError: judge, questions, rule or prompts differ, so that nothing can be compared.
    """
    mine, other = (read_result(f, benchmark) for f in (folder, against))
    for field, what in SAME.items():
        if mine[field] != other[field]:
            raise SuiteError(
                f"against={against}: {benchmark.name} has another {what} there ({_short(other[field])}) than here "
                f"({_short(mine[field])}). Score both in the same way"
            )
    made = [result["images"]["made"] for result in (mine, other)]
    rows = [read_rows(f / benchmark.folder / ROWS) for f in (folder, against)]
    return {
        "against": str(against),
        "figures": differences(rows[0], rows[1], benchmark.combine),
        "drawn_otherwise": [
            f"{name}: {made[0][name]}, {made[1][name]} there"
            for name in DRAWN
            if name in made[0] and name in made[1] and made[0][name] != made[1][name]
        ],
    }


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{card['name']}@{card['revision']}" for card in value.values())
    return str(value)
