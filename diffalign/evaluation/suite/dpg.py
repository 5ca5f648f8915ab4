"""DPG-Bench: yes/no questions with parents on long prompts (ELLA, arXiv 2403.05135).

The release drops its first row, lets zeros run in the file's order, and takes categories from the last image only. The
corrected rule has none of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign.core.text import read_text
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
    IN_FILE_ORDER,
    PROPAGATED,
    answers_of,
    check_parents,
    checklist,
    mean_span,
    yes_no,
)
from diffalign.evaluation.suite.tables import open_table
from diffalign.judges.base import Question

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read prompts in DPG-Bench's table, one row a question.

    Raises:
        SuiteError: a column is missing, or a question's parents do not exist or form a circle.
    """
    text = read_text(paths[0], error=SuiteError)
    reader = open_table(text, COLUMNS, str(paths[0]), "DPG-Bench's")
    items: dict[str, dict[str, list[str]]] = {}
    texts: dict[str, str] = {}
    for row in reader:
        name = row["item_id"]
        texts.setdefault(name, row["text"])
        entry = items.setdefault(name, {"keys": [], "asked": [], "above": [], "categories": []})
        entry["keys"].append(row["proposition_id"].strip())
        entry["asked"].append(row["question_natural_language"])
        entry["above"].append(row["dependency"])
        entry["categories"].append(row["tuple"].partition("(")[0].partition("-")[0].strip())
    prompts = []
    for number, (name, entry) in enumerate(items.items()):
        metadata = {"prompt": texts[name], "item_id": name, "first": number == 0, **entry}
        prompt = Prompt(texts[name], metadata)
        check_parents(parents(prompt), f"{paths[0]} ({name})")
        prompts.append(prompt)
    return prompts


def parents(prompt: Prompt) -> dict[str, list[str]]:
    """Return the parents of each question; 0 stands for none."""
    return {
        key: [part.strip() for part in text.split(",") if part.strip() not in ("", "0")]
        for key, text in zip(prompt.metadata["keys"], prompt.metadata["above"], strict=True)
    }


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one yes/no question for each row."""
    rows = zip(prompt.metadata["keys"], prompt.metadata["asked"], strict=True)
    return [yes_no(key, text) for key, text in rows]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return the share of right answers of each image, and of each category.

    Images count after zeroing, categories before it.
    """
    rows = []
    above = parents(prompt)
    for number, replies in enumerate(images):
        plain = answers_of(replies, above)
        zeroing = IN_FILE_ORDER if variant == OFFICIAL else PROPAGATED
        score = mean_span(list(checklist(plain, above, zeroing=zeroing).values()))
        if variant == OFFICIAL and prompt.metadata["first"]:
            # the release drops the first row of all, fails on its dependants, and skips the prompt
            continue
        rows.append(Measure("score", *score, image=number))
        if variant == OFFICIAL and number < len(images) - 1:
            continue
        rows += [
            Measure(f"category/{category}", *plain[key], image=number)
            for key, category in zip(above, prompt.metadata["categories"], strict=True)
        ]
    return rows


GLM = "GLM-Image's README, judge mPLUG-large"
BENCHMARK = Benchmark(
    name="dpg",
    summary="long dense prompts: yes/no questions with parents",
    load=load,
    questions=questions,
    measures=measures,
    headline="score",
    files=(
        DataFile(
            "TencentQQGYLab/ELLA",
            "3c228f1dc6c4d3cad0a47493816151a419f14db3",
            "dpg_bench/dpg_bench.csv",
            None,
        ),
    ),
    licence="Apache-2.0",
    images_per_prompt=4,
    judge="Qwen/Qwen3-VL-8B-Instruct",
    published={"stable-diffusion-xl": (74.65, GLM), "FLUX.1-dev": (83.52, GLM)},
    layout="dpg",
    note="Published figures are mPLUG-large's and do not compare with this judge's.",
)
