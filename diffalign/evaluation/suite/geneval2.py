"""GenEval 2: composition of objects, counts, attributes, positions and verbs (arXiv 2512.16853).

A judge gives the probability of the right answer to each question. A prompt's score is the geometric mean of its
questions (Soft-TIFA GM).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.core.text import read_json_lines
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite.base import (
    OFFICIAL,
    Benchmark,
    DataFile,
    Measure,
    Replies,
    SuiteError,
)
from diffalign.evaluation.suite.checklist import soft_tifa
from diffalign.judges.base import YES, Question, probability

NUMBERS = {
    word: number
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
ONE_WORD = "Answer with one word."
SKILLS = ("object", "attribute", "count", "position", "verb")


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read prompts in GenEval 2's format: `prompt`, `atom_count`, `vqa_list`, `skills`.

    Raises:
        SuiteError: a line does not have the format; the message names it.
    """
    entries = read_json_lines(paths[0], error=SuiteError)
    return [read_entry(entry, f"{paths[0]}:{n}") for n, entry in enumerate(entries, 1)]


def read_entry(entry: Any, place: str) -> Prompt:
    """Return the prompt of one entry of the file.

    Raises:
        SuiteError: the entry does not have the format.
    """
    try:
        text, pairs, skills = entry["prompt"], entry["vqa_list"], entry["skills"]
        whole = (
            isinstance(text, str)
            and bool(pairs)
            and len(pairs) == len(skills)
            and isinstance(entry["atom_count"], int)
            and all(isinstance(q, str) and _is_answer(a) for q, a in pairs)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SuiteError(f"{place} is not an entry of GenEval 2: {error!r}") from error
    if not whole:
        raise SuiteError(
            f"{place} is not an entry of GenEval 2: it needs as many skills as questions, and answers that are "
            "Yes or a number word. Correct that line"
        )
    return Prompt(text, dict(entry))


def _is_answer(answer: Any) -> bool:
    return isinstance(answer, str) and (answer == "Yes" or answer.lower() in NUMBERS)


def forms(answer: str) -> tuple[str, ...]:
    """Return the surface forms of an answer, as GenEval 2 lists them."""
    if answer == "Yes":
        return YES
    word, digit = answer.lower(), str(NUMBERS[answer.lower()])
    return (word, word.capitalize(), f" {word}", f" {word.capitalize()}", digit, f" {digit}")


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one question for each pair of `vqa_list`.

    The official rule adds the probability of a bare space to counts, as its release does.
    """
    return [
        Question(
            str(number),
            f"{text}\n{ONE_WORD}",
            words=(forms(answer),),
            space_token=variant == OFFICIAL and answer != "Yes",
        )
        for number, (text, answer) in enumerate(prompt.metadata["vqa_list"])
    ]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return GM, AM, each skill's probabilities, and GM by the number of atoms."""
    rows = []
    skills = prompt.metadata["skills"]
    for number, replies in enumerate(images):
        spans = [probability(replies.get(str(i))) for i in range(len(skills))]
        arithmetic, geometric = soft_tifa(spans)
        rows += [Measure("gm", *geometric, image=number), Measure("am", *arithmetic, image=number)]
        rows += [
            Measure(f"skill/{skill}", *span, image=number)
            for skill, span in zip(skills, spans, strict=True)
        ]
        atoms = prompt.metadata["atom_count"]
        rows.append(Measure(f"atoms/{atoms}", *geometric, image=number))
    return rows


BENCHMARK = Benchmark(
    name="geneval2",
    summary="composition: objects, counts, attributes, positions, verbs (Soft-TIFA)",
    load=load,
    questions=questions,
    measures=measures,
    headline="gm",
    files=(
        DataFile(
            "facebookresearch/GenEval2",
            "a6e82d2289e8d418f27f0adee77908b07060eea3",
            "geneval2_data.jsonl",
            "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
        ),
    ),
    licence="CC BY-NC 4.0",
    judge="Qwen/Qwen3-VL-8B-Instruct",
    published={"Qwen-Image-2512": (32.97, "arXiv 2609.38721")},
    layout="geneval2",
    note="GenEval 2 is not GenEval: its figures are 20 to 40 where GenEval's are 50 to 95.",
)
