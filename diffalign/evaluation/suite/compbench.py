"""T2I-CompBench's attributes: colour, shape and texture of named objects (arXiv 2307.06350).

A question names each noun phrase of the prompt; the score is the product of the probabilities of a yes. The release
asks BLIP-VQA and parses with spaCy; here phrases come from the prompts' own form, "A X and a Y".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.suite.base import (
    Benchmark,
    DataFile,
    Measure,
    Replies,
    Weights,
    mean_of,
)
from diffalign.evaluation.suite.checklist import ONE_WORD
from diffalign.judges.base import YES, Question, probability

SETS = {
    "color": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "shape": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "texture": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
}
"""sha256 of each set's file of prompts."""
MOST = 8
"""Largest number of phrases that are asked for."""
_ARTICLE = re.compile(r"^(?:a|an|the|some|one)\s+", re.IGNORECASE)
_SPLIT = re.compile(r",\s*(?:and\s+)?|\s+and\s+", re.IGNORECASE)


def phrases(text: str) -> list[str]:
    """Return the noun phrases of "a X and a Y", without articles."""
    parts = [part.strip(" .") for part in _SPLIT.split(text)]
    return [_ARTICLE.sub("", part) for part in parts if part][:MOST]


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read one prompt a line from the file of each set.

    Raises:
        PromptError: a file holds no prompt.
    """
    return [
        Prompt(prompt.text, {**prompt.metadata, "set": name})
        for path, name in zip(paths, SETS, strict=True)
        for prompt in load_prompts(str(path))
    ]


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one yes/no question for each noun phrase."""
    return [
        Question(str(n), f"{phrase}?\n{ONE_WORD}", words=(YES,))
        for n, phrase in enumerate(phrases(prompt.text))
    ]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return the product of the probabilities of a yes, for each image."""
    rows = []
    for number, replies in enumerate(images):
        spans = [probability(replies.get(str(n))) for n in range(len(phrases(prompt.text)))]
        lows, highs = zip(*spans, strict=True)
        score = (math.prod(lows), math.prod(highs))
        rows.append(Measure(f"set/{prompt.metadata['set']}", *score, image=number))
    return rows


def combine(names: Sequence[str]) -> Weights:
    """Return the mean of the three sets."""
    return {"attributes": mean_of(names, "set/")}


BENCHMARK = Benchmark(
    name="compbench",
    summary="T2I-CompBench's attributes: colour, shape, texture",
    load=load,
    questions=questions,
    measures=measures,
    headline="attributes",
    files=tuple(
        DataFile(
            "Karine-Huang/T2I-CompBench",
            "1b7094991a57f3c22abdd4f6e8ba6c1a15517073",
            f"examples/dataset/{name}_val.txt",
            digest,
        )
        for name, digest in SETS.items()
    ),
    licence="MIT",
    images_per_prompt=10,
    judge="Qwen/Qwen3-VL-8B-Instruct",
    combine=combine,
    scale=1.0,
    layout="compbench",
    note="Published figures are BLIP-VQA's and do not compare with this judge's.",
)
