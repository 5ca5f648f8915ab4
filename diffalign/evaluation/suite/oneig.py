"""OneIG-Bench's alignment checklist, English: yes/no questions with parents (NeurIPS 2025 D&B).

The release sets a question to 0 if a parent's own answer is no; the corrected rule lets zeros run down the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.core.text import parse_json, read_json, read_text
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite.base import (
    OFFICIAL,
    Benchmark,
    DataFile,
    Measure,
    Replies,
    SuiteError,
)
from diffalign.evaluation.suite.checklist import (
    PROPAGATED,
    RAW,
    answers_of,
    check_parents,
    checklist,
    mean_span,
    yes_no,
)
from diffalign.evaluation.suite.tables import open_table
from diffalign.judges.base import Question

REPOSITORY, COMMIT = "OneIG-Bench/OneIG-Benchmark", "41b49831e79e6dde5323618c164da1c4cf0f699d"
SETS = {"anime": "Anime_Stylization", "human": "Portrait", "object": "General_Object"}
"""Category of the table, by the name of its file of questions."""


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read the table of prompts and the three files of questions.

    Raises:
        SuiteError: a file does not have the format, or a question's parents do not exist or form a circle.
    """
    table = read_text(paths[0], error=SuiteError)
    reader = open_table(table, ("category", "id", "prompt_en"), str(paths[0]), "OneIG-Bench's")
    texts = {(row["category"], row["id"].strip().zfill(3)): row["prompt_en"] for row in reader}
    items = []
    for path, (name, category) in zip(paths[1:], SETS.items(), strict=True):
        entries: dict[str, Any] = read_json(path, error=SuiteError)
        for number, entry in entries.items():
            place = f"{path} ({number})"
            text = texts.get((category, number))
            if text is None:
                raise SuiteError(f"{place}: the table has no prompt {number} of {category}")
            texts_asked = parse_json(entry["question"], place, error=SuiteError)
            above = parse_json(entry["dependency"], place, error=SuiteError)
            tree = {key: [str(p) for p in above.get(key, []) if p != 0] for key in texts_asked}
            check_parents(tree, place)
            metadata = {
                "prompt": text,
                "id": number,
                "set": name,
                "asked": texts_asked,
                "above": tree,
            }
            items.append(Prompt(text, metadata))
    return items


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one yes/no question for each entry."""
    return [yes_no(key, text) for key, text in prompt.metadata["asked"].items()]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return the share of right answers of each image, after zeroing."""
    rows = []
    tree = prompt.metadata["above"]
    for number, replies in enumerate(images):
        plain = answers_of(replies, tree)
        zeroed = checklist(plain, tree, zeroing=RAW if variant == OFFICIAL else PROPAGATED)
        score = mean_span(list(zeroed.values()))
        rows.append(Measure("alignment", *score, image=number))
        rows.append(Measure(f"set/{prompt.metadata['set']}", *score, image=number))
    return rows


TABLE = "OneIG-Bench's table of alignment"
BENCHMARK = Benchmark(
    name="oneig",
    summary="alignment checklist on anime, portraits and objects",
    load=load,
    questions=questions,
    measures=measures,
    headline="alignment",
    files=(
        DataFile(
            REPOSITORY,
            COMMIT,
            "OneIG-Bench.csv",
            "e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1",
        ),
        DataFile(
            REPOSITORY,
            COMMIT,
            "scripts/alignment/Q_D/anime.json",
            "21ea3d0360e69d72bc5f4cbb93b203d293d16f5c2f626634a52b990119e0a6e3",
        ),
        DataFile(
            REPOSITORY,
            COMMIT,
            "scripts/alignment/Q_D/human.json",
            "0e92b25c6bc4091cac05fa0f4269b3b37465a7cd43ca2768f55f56149cdbf13b",
        ),
        DataFile(
            REPOSITORY,
            COMMIT,
            "scripts/alignment/Q_D/object.json",
            "350dfdf72c2da143c78a7544d4c554faf6698c1ba4fcd27c7a9cc9199d487e0e",
        ),
    ),
    licence="none stated",
    images_per_prompt=4,
    judge="Qwen/Qwen2.5-VL-7B-Instruct",
    scale=1.0,
    published={"FLUX.1-dev": (0.786, TABLE), "Qwen-Image": (0.882, TABLE)},
    layout="oneig",
)
