"""Stand-ins of benchmarks for Shapes, in the formats of the originals: the whole path runs without a download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.suite import geneval2, preference, unigenbench
from diffalign.geneval.rules import plural
from diffalign.judges.base import Question

WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
PROMPTS = "shapes:held_out"


def clause_questions(metadata: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return question, answer and skill of every atom of a Shapes prompt."""
    atoms: list[tuple[str, str, str]] = []
    clauses = metadata["include"]
    for clause in clauses:
        name, count = clause["class"], clause["count"]
        shown = name if count == 1 else plural(name)
        atoms.append((f"How many {plural(name)} are in the image?", WORDS[count], "count"))
        if "color" in clause:
            verb = "Is" if count == 1 else "Are"
            atoms.append((f"{verb} the {shown} {clause['color']}?", "Yes", "attribute"))
        atoms.append((f"Are there any {plural(name)} in the image?", "Yes", "object"))
        if "position" in clause:
            relation, other = clause["position"]
            target = clauses[other]["class"]
            atoms.append((f"Is the {name} {relation} the {target}?", "Yes", "position"))
    return atoms


def load_checklist(paths: Sequence[Path]) -> list[Prompt]:
    """Return Shapes' held-out prompts in GenEval 2's format."""
    items = []
    for prompt in load_prompts(PROMPTS):
        atoms = clause_questions(prompt.metadata)
        entry = {
            **prompt.metadata,
            "atom_count": len(atoms),
            "vqa_list": [[question, answer] for question, answer, _ in atoms],
            "skills": [skill for _, _, skill in atoms],
        }
        items.append(geneval2.read_entry(entry, prompt.text))
    return items


CHECKLIST = replace(
    geneval2.BENCHMARK,
    name="shapes:checklist",
    summary="GenEval 2's rule on Shapes' held-out prompts, with the verifier as judge",
    load=load_checklist,
    files=(),
    licence="Apache-2.0",
    judge="exact",
    published={},
    layout="",
    note="A stand-in for GenEval 2 on Shapes; its figures compare with no other benchmark's.",
)


RUBRIC_NAMES = {
    "count": "Attribute - Quantity",
    "attribute": "Attribute - Color",
    "object": "Entity",
    "position": "Relationship - Position",
}
"""Kind of test point for each skill."""


def load_rubric(paths: Sequence[Path]) -> list[Prompt]:
    """Return Shapes' held-out prompts with test points, in UniGenBench's form.

    A test point is a yes/no question; counts are asked for by the checklist only.
    """
    items = []
    for prompt in load_prompts(PROMPTS):
        atoms = [a for a in clause_questions(prompt.metadata) if a[2] != "count"]
        metadata = {
            **prompt.metadata,
            "testpoints": [RUBRIC_NAMES[skill] for _, _, skill in atoms],
            "descriptions": [question for question, _, _ in atoms],
        }
        items.append(Prompt(prompt.text, metadata))
    return items


def rubric_questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one question that names all test points, one a line."""
    points = "\n".join(f"{n}. {text}" for n, text in enumerate(prompt.metadata["descriptions"], 1))
    text = unigenbench.TASK.format(prompt=prompt.text, points=points)
    return [Question("testpoints", text, kind="text", max_tokens=1024)]


RUBRIC = replace(
    unigenbench.BENCHMARK,
    name="shapes:rubric",
    summary="UniGenBench's rule on Shapes' held-out prompts, with the verifier as judge",
    load=load_rubric,
    questions=rubric_questions,
    files=(),
    licence="Apache-2.0",
    judge="exact",
    images_per_prompt=1,
    published={},
    layout="",
    note="A stand-in for UniGenBench on Shapes; its figures compare with no other benchmark's.",
)


def load_plain(paths: Sequence[Path]) -> list[Prompt]:
    """Return Shapes' held-out prompts."""
    return load_prompts(PROMPTS)


PREFERENCE = replace(
    preference.BENCHMARK,
    name="shapes:preference",
    summary="rewards and diversity on Shapes' held-out prompts",
    load=load_plain,
    files=(),
    licence="Apache-2.0",
    rewards=("verifier", "shapes_clip", "flatness"),
    features="shapes_clip",
)
