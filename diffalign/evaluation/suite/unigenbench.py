"""UniGenBench, English short prompts: ten dimensions with 27 kinds of test points (arXiv 2508.20751).

A judge reads all test points of a prompt at once and gives each 0 or 1. The overall is the mean of ten dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign.core.text import parse_json, read_text
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite.base import (
    Benchmark,
    DataFile,
    Measure,
    Replies,
    SuiteError,
    Weights,
    mean_of,
)
from diffalign.evaluation.suite.rubric import tagged_list
from diffalign.evaluation.suite.tables import open_table
from diffalign.judges.base import Question, said

PRIMARY, SUB = "primary/", "sub/"
TASK = (
    "Decide for every numbered test point whether the image fulfils it. The image was drawn for this prompt:\n"
    "{prompt}\n\nTest points:\n{points}\n\n"
    "Think briefly about each of them. Then end with one line <score>[...]</score> that holds a 1 (fulfilled) or a "
    "0 (not fulfilled) for each test point, in their order and separated by commas."
)


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read prompts in UniGenBench's format: index, prompt_en, sub_dims_en (JSON).

    Raises:
        SuiteError: a row does not have the format; the message names its index.
    """
    return read_table(read_text(paths[0], error=SuiteError), str(paths[0]))


def read_table(text: str, place: str) -> list[Prompt]:
    """Return the prompts of a table in UniGenBench's format."""
    items = []
    reader = open_table(text, ("index", "prompt_en", "sub_dims_en"), place, "UniGenBench's")
    for row in reader:
        where = f"{place}:{reader.line_num} (index {row['index']})"
        details = parse_json(row["sub_dims_en"], where, error=SuiteError)
        points = details.get("Testpoints") if isinstance(details, dict) else None
        texts = details.get("Testpoint Description") if isinstance(details, dict) else None
        if not points or not isinstance(texts, list) or len(points) != len(texts):
            raise SuiteError(
                f"{where} needs as many descriptions as test points, and at least one. Correct that line"
            )
        metadata = {
            "prompt": row["prompt_en"],
            "index": row["index"],
            "testpoints": points,
            "descriptions": texts,
        }
        items.append(Prompt(row["prompt_en"], metadata))
    if not items:
        raise SuiteError(f"{place} holds no prompt")
    return items


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one question that names all test points."""
    pairs = zip(prompt.metadata["testpoints"], prompt.metadata["descriptions"], strict=True)
    points = "\n".join(f"{n}. {kind}: {text}" for n, (kind, text) in enumerate(pairs, 1))
    text = TASK.format(prompt=prompt.text, points=points)
    return [Question("testpoints", text, kind="text", max_tokens=4096)]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return 0 or 1 for each test point, under its dimension and its kind."""
    rows = []
    points = prompt.metadata["testpoints"]
    for number, replies in enumerate(images):
        # only the scores are read: an apostrophe in the analysis kills nothing
        scores = tagged_list(said(replies.get("testpoints")), len(points))
        for i, point in enumerate(points):
            low, high = (0.0, 1.0) if scores is None else (float(scores[i]), float(scores[i]))
            primary = point.partition("-")[0].strip()
            rows.append(Measure(f"{PRIMARY}{primary}", low, high, image=number))
            if primary != point.strip():
                rows.append(Measure(f"{SUB}{point.strip()}", low, high, image=number))
    return rows


def combine(names: Sequence[str]) -> Weights:
    """Return the overall: the plain mean of the dimensions, as the leaderboard prints it."""
    return {"overall": mean_of(names, PRIMARY)}


LEADERBOARD = "UniGenBench's docs/static/images/en_short.png"
BENCHMARK = Benchmark(
    name="unigenbench",
    summary="breadth: style, knowledge, logic, grammar, layout, text and more",
    load=load,
    questions=questions,
    measures=measures,
    headline="overall",
    files=(
        DataFile(
            "CodeGoat24/UniGenBench",
            "49d0bcebb0b9418d975d3957c2fee10f34811d14",
            "data/test_prompts_en.csv",
            "f82e8ce854985ef963378eaaf8ce12f2e3a57dd6f53e1aea84a61fbeadfe4459",
        ),
    ),
    licence="CC BY 4.0",
    images_per_prompt=4,
    judge="CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1",
    combine=combine,
    published={
        "stable-diffusion-xl": (40.22, LEADERBOARD),
        "FLUX.1-dev": (60.97, LEADERBOARD),
        "Qwen-Image": (78.36, LEADERBOARD),
    },
    layout="unigenbench",
    note="The question is this suite's own, so that figures differ from the leaderboard's by the wording as well.",
)
