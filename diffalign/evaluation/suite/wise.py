"""WISE_Verified: world knowledge in images, judged 0 or 1 (PKU-YuanGroup/WISE)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign.core.text import read_json
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite.base import (
    Benchmark,
    DataFile,
    Measure,
    Replies,
    SuiteError,
    Weights,
)
from diffalign.evaluation.suite.rubric import named_number
from diffalign.judges.base import Question, said

RANGES = ((400, "culture"), (520, "time"), (640, "space"), (760, "biology"), (880, "physics"))
LAST = "chemistry"
CULTURE, OTHER = 0.4, 0.12
"""Weights of culture and of each of the five other categories in the overall."""
SYSTEM = (
    "You check whether images show what their prompts mean, and you answer in the asked form only."
)
TASK = (
    "An image was drawn for a prompt that says something indirectly.\nPrompt: {prompt}\nWhat it means: {explanation}\n"
    "Does the image show what is meant? Answer with one line: Score: 1 if it does, Score: 0 if it does not."
)


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read prompts in WISE_Verified's format: Prompt, Explanation, Category, Subcategory, prompt_id.

    Raises:
        SuiteError: an entry does not have the format, or an id occurs twice.
    """
    entries = read_json(paths[0], error=SuiteError)
    if not isinstance(entries, list):
        raise SuiteError(f"{paths[0]} must hold a list of prompts")
    items, numbers = [], set()
    for n, entry in enumerate(entries, 1):
        try:
            text, number = entry["Prompt"], int(entry["prompt_id"])
            metadata = {"prompt": text, "explanation": entry["Explanation"], "prompt_id": number}
        except (KeyError, TypeError, ValueError) as error:
            raise SuiteError(f"{paths[0]}: entry {n} is not one of WISE ({error!r})") from error
        if number in numbers:
            raise SuiteError(f"{paths[0]}: entry {n} has the prompt_id {number} of an earlier one")
        numbers.add(number)
        items.append(Prompt(text, metadata))
    return items


def category(number: int) -> str:
    """Return the category of a prompt by its id."""
    return next((name for last, name in RANGES if number <= last), LAST)


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one question with the prompt and its explanation."""
    text = TASK.format(prompt=prompt.text, explanation=prompt.metadata["explanation"])
    return [Question("score", text, kind="text", max_tokens=500, system=SYSTEM)]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return 0 or 1 under the prompt's category."""
    rows = []
    name = f"category/{category(prompt.metadata['prompt_id'])}"
    for number, replies in enumerate(images):
        value = named_number(said(replies.get("score")), "score", 0, 1)
        low, high = (value, value) if value in (0.0, 1.0) else (0.0, 1.0)
        rows.append(Measure(name, low, high, image=number))
    return rows


def combine(names: Sequence[str]) -> Weights:
    """Return the overall: 0.4 of culture and 0.12 of each other category, if all six are there."""
    parts = {f"category/{name}": OTHER for name in (*(n for _, n in RANGES[1:]), LAST)}
    parts = {"category/culture": CULTURE, **parts}
    present = {name: weight for name, weight in parts.items() if name in names}
    total = sum(present.values())
    return {"overall": {name: weight / total for name, weight in present.items()}}


TABLE = "WISE's leadboard.md, judge Qwen3.5-35B-A3B"
BENCHMARK = Benchmark(
    name="wise",
    summary="world knowledge: does the image show what the prompt means?",
    load=load,
    questions=questions,
    measures=measures,
    headline="overall",
    files=(
        DataFile(
            "PKU-YuanGroup/WISE",
            "eb51174483a5de2e34e8614cf9dfb3319ee7fcd0",
            "data_verified/merge.json",
            "10f2690624ed8f03f21bd3e9c535e26f791da8bab67ac857903bede65985b82d",
        ),
    ),
    licence="none stated",
    judge="Qwen/Qwen3.5-35B-A3B",
    combine=combine,
    scale=1.0,
    published={
        "stable-diffusion-3.5-medium": (0.376, TABLE),
        "FLUX.1-dev": (0.416, TABLE),
        "Qwen-Image": (0.510, TABLE),
    },
    layout="wise",
)
