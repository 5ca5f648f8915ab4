"""What a policy knows of relations and of whose a colour is, apart from whether it draws the objects at all.

GenEval's `position` and `color_attr` are right where both objects are there and stand as asked. The first can be learnt
without the second: then the score rises and ends at what chance leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffalign.data.prompts import Prompt
from diffalign.geneval.rules import RELATIONS, Detection, relative_position

Detect = Callable[[np.ndarray], list[Detection]]


def _share(hits: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Mean of hits, each with its prompt, and its standard error: images of one prompt are no independent evidence. Of
    none, None."""
    if not hits:
        return {"share": None, "error": None, "images": 0}
    mean = sum(hit for _, hit in hits) / len(hits)
    off: dict[str, float] = {}
    for prompt, hit in hits:
        off[prompt] = off.get(prompt, 0.0) + hit - mean
    error = sum(value**2 for value in off.values()) ** 0.5 / len(hits)
    return {
        "share": round(mean, 4),
        "error": round(error, 4) if len(off) > 1 else None,
        "images": len(hits),
    }


def _best(found: Sequence[Detection], name: str) -> Detection | None:
    return max((d for d in found if d.name == name), key=lambda d: d.score, default=None)


def positions(images: Sequence[np.ndarray], prompts: Sequence[Prompt], detect: Detect) -> Any:
    """Of GenEval's `position` prompts: how often both objects are there, how often then in the relation asked for, and
    how often in a relation drawn by chance (the mean of all four; a diagonal is two of them)."""
    both: list[tuple[str, float]] = []
    asked: list[tuple[str, float]] = []
    chance: list[tuple[str, float]] = []
    for image, prompt in zip(images, prompts, strict=True):
        target, placed = prompt.metadata["include"]
        found = detect(image)
        a, b = _best(found, placed["class"]), _best(found, target["class"])
        both.append((prompt.text, a is not None and b is not None))
        if a is not None and b is not None:
            holds = relative_position(a.box, b.box)
            asked.append((prompt.text, placed["position"][0] in holds))
            chance.append((prompt.text, len(holds) / len(RELATIONS)))
    return {
        "both objects": _share(both),
        "then as asked": _share(asked),
        "then by chance": _share(chance),
    }


def colours(images: Sequence[np.ndarray], prompts: Sequence[Prompt], detect: Detect) -> Any:
    """Of GenEval's `color_attr` prompts: how often both objects are there and have the two colours, whichever way
    around, and how often then the right way (by chance: half)."""
    both: list[tuple[str, float]] = []
    asked: list[tuple[str, float]] = []
    for image, prompt in zip(images, prompts, strict=True):
        clauses, detected = prompt.metadata["include"], detect(image)
        found = [_best(detected, c["class"]) for c in clauses]
        has = [None if d is None else d.color for d in found]
        wanted = [c["color"] for c in clauses]
        there = sorted(map(str, has)) == sorted(wanted)
        both.append((prompt.text, there))
        if there:
            asked.append((prompt.text, has == wanted))
    return {"both objects and colours": _share(both), "then as asked": _share(asked)}
