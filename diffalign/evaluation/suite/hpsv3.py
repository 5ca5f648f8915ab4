"""HPSv3's benchmark: the mean raw score of twelve categories of prompts (arXiv 2508.03789)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffalign.core.text import read_json
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite import preference
from diffalign.evaluation.suite.base import DataFile, SuiteError


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read a JSON object with the texts of each category.

    Raises:
        SuiteError: the file is not such an object.
    """
    categories = read_json(paths[0], error=SuiteError)
    if not isinstance(categories, dict) or not all(
        isinstance(v, list) for v in categories.values()
    ):
        raise SuiteError(f"{paths[0]} must hold an object with a list of prompts for each category")
    return [
        Prompt(text, {"prompt": text, "category": name})
        for name, texts in categories.items()
        for text in texts
    ]


PAGE = "HPSv3's project page"
BENCHMARK = replace(
    preference.BENCHMARK,
    name="hpsv3",
    summary="raw HPSv3 on the prompts of its benchmark, by category",
    load=load,
    # the commit is not pinned, because the file has not been seen; results hold its digest
    files=(DataFile("datasets/MizzenAI/HPDv3", "", "benchmark.json", None),),
    licence="MIT (code)",
    images_per_prompt=1,
    headline="reward/hpsv3",
    rewards=("hpsv3",),
    published={"FLUX.1-dev": (10.43, PAGE), "Kolors": (10.55, PAGE)},
)
