"""PartiPrompts: 1,632 prompts with categories and challenges, under rewards (arXiv 2206.10789)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffalign.core.text import read_text
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite import preference
from diffalign.evaluation.suite.base import DataFile, SuiteError
from diffalign.evaluation.suite.tables import open_table


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read PartiPrompts' table: Prompt, Category, Challenge, Note, separated by tabs.

    Raises:
        SuiteError: a column is missing.
    """
    text = read_text(paths[0], error=SuiteError)
    reader = open_table(
        text,
        ("Prompt", "Category"),
        str(paths[0]),
        "PartiPrompts'",
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
    )
    return [
        Prompt(row["Prompt"], {"prompt": row["Prompt"], "category": row["Category"]})
        for row in reader
    ]


BENCHMARK = replace(
    preference.BENCHMARK,
    name="partiprompts",
    summary="rewards and diversity on PartiPrompts, by category",
    load=load,
    files=(
        DataFile(
            "google-research/parti",
            "5a657978134374ce28973948331b319adef164bd",
            "PartiPrompts.tsv",
            "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
        ),
    ),
    licence="Apache-2.0",
)
