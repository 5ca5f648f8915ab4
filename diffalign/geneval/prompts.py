"""GenEval's 553 prompts, generated with the published seed.

One generator draws 80 + 5 x 100 prompts in the order of the tasks; duplicates are left out. They equal the published
`evaluation_metadata.jsonl` byte for byte (Ghosh et al. 2023, MIT), with any NumPy whose `Generator.choice` and
`Generator.integers` draw like version 1.17's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import numpy as np

from diffalign.geneval.rules import (
    CLASSES,
    COLORS,
    NUMBERS,
    RELATIONS,
    Metadata,
    clause,
    entry,
    plural,
)

SEED = 43
DRAWS = 100
"""Draws per task, except for the first task, which has each class once."""
TRAINING_SEED, TRAINING_DRAWS = 44, 2000


@cache
def _prompts() -> tuple[str, ...]:
    rng = np.random.default_rng(SEED)
    lines = (json.dumps(prompt) for prompt in _drawn(rng))
    return tuple(dict.fromkeys(lines))


def prompts() -> list[Metadata]:
    """Return all prompts as metadata: `tag`, `include`, perhaps `exclude`, and `prompt`."""
    return [json.loads(line) for line in _prompts()]


@cache
def _training_prompts() -> tuple[str, ...]:
    rng = np.random.default_rng(TRAINING_SEED)
    lines = dict.fromkeys(json.dumps(entry) for entry in _drawn(rng, draws=TRAINING_DRAWS))
    published = {json.loads(line)["prompt"] for line in _prompts()}
    return tuple(line for line in lines if json.loads(line)["prompt"] not in published)


def training_prompts() -> list[Metadata]:
    """Return training prompts of the same form.

    None of the published prompts is among them, so there are no single objects.
    """
    return [json.loads(line) for line in _training_prompts()]


def jsonl() -> str:
    """Return the published file."""
    return "".join(line + "\n" for line in _prompts())


def _drawn(rng: np.random.Generator, *, draws: int = DRAWS) -> Iterator[Metadata]:
    for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False):
        yield entry("single_object", [clause(CLASSES[i])], _article(CLASSES[i]))
    for draw in (_two_object, _counting, _colors, _position, _color_attr):
        for _ in range(draws):
            yield draw(rng)


def _two_object(rng: np.random.Generator) -> Metadata:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    return entry("two_object", [clause(a), clause(b)], f"{_article(a)} and {_article(b)}")


def _counting(rng: np.random.Generator) -> Metadata:
    name, count = CLASSES[rng.choice(len(CLASSES))], int(rng.integers(2, 4, endpoint=True))
    return entry(
        "counting",
        [clause(name, count)],
        f"{NUMBERS[count]} {plural(name)}",
        exclude=[clause(name, count + 1)],
    )


def _colors(rng: np.random.Generator) -> Metadata:
    name, color = _coloured(rng.choice(len(CLASSES) - 1)), COLORS[rng.choice(len(COLORS))]
    return entry("colors", [clause(name, color=color)], f"{_article(color)} {name}")


def _position(rng: np.random.Generator) -> Metadata:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    return entry(
        "position",
        [clause(b), clause(a, position=[relation, 0])],
        f"{_article(a)} {relation} {_article(b)}",
    )


def _color_attr(rng: np.random.Generator) -> Metadata:
    a, b = (_coloured(i) for i in rng.choice(len(CLASSES) - 1, size=2, replace=False))
    c, d = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    return entry(
        "color_attr",
        [clause(a, color=c), clause(b, color=d)],
        f"{_article(c)} {a} and {_article(d)} {b}",
    )


def _coloured(index: int) -> str:
    """Return the name of a class other than the first: persons have no colour."""
    return CLASSES[index + 1]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
