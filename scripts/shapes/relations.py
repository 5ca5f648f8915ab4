"""Measure whether a policy renders relations and colour owners, apart from rendering objects.

GenEval's `position` and `color_attr` require that both objects are present and arranged as the prompt says. A policy
can learn the first without the second; its score then rises to what chance gives and stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffalign.data.prompts import Prompt
from diffalign.geneval.rules import RELATIONS, Detection, relative_position
from diffalign.pipelines.base import TextToImageModel
from diffalign.scripts.shapes.evaluation import draw_shapes
from diffalign.shapes.prompts import prompts
from diffalign.shapes.verifier import detect

Detect = Callable[[np.ndarray], list[Detection]]


def _share(hits: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return the mean of hits (prompt, hit) and its standard error over prompts.

    Images of one prompt are not independent, so errors are summed by prompt. Without hits, return None for both.
    """
    if not hits:
        return {"share": None, "error": None, "images": 0}
    mean = sum(hit for _, hit in hits) / len(hits)
    residuals: dict[str, float] = {}
    for prompt, hit in hits:
        residuals[prompt] = residuals.get(prompt, 0.0) + hit - mean
    error = sum(value**2 for value in residuals.values()) ** 0.5 / len(hits)
    return {
        "share": round(mean, 4),
        "error": round(error, 4) if len(residuals) > 1 else None,
        "images": len(hits),
    }


def _best(detections: Sequence[Detection], name: str) -> Detection | None:
    return max((d for d in detections if d.name == name), key=lambda d: d.score, default=None)


def positions(images: Sequence[np.ndarray], prompts: Sequence[Prompt], detect: Detect) -> Any:
    """Score the relations of GenEval's `position` prompts.

    Return how often both objects are present, how often such images have the prompted relation, and how often they
    would have it by chance. Chance is the mean over all four relations; a diagonal satisfies two of them.
    """
    both: list[tuple[str, float]] = []
    right: list[tuple[str, float]] = []
    chance: list[tuple[str, float]] = []
    for image, prompt in zip(images, prompts, strict=True):
        target, placed = prompt.metadata["include"]
        detections = detect(image)
        a, b = _best(detections, placed["class"]), _best(detections, target["class"])
        both.append((prompt.text, a is not None and b is not None))
        if a is not None and b is not None:
            relations = relative_position(a.box, b.box)
            right.append((prompt.text, placed["position"][0] in relations))
            chance.append((prompt.text, len(relations) / len(RELATIONS)))
    return {
        "both objects": _share(both),
        "then as prompted": _share(right),
        "then by chance": _share(chance),
    }


def colours(images: Sequence[np.ndarray], prompts: Sequence[Prompt], detect: Detect) -> Any:
    """Score the colour owners of GenEval's `color_attr` prompts.

    Return how often both objects are present with the two colours in either order, and how often such images have the
    prompted order. Chance gives half.
    """
    both: list[tuple[str, float]] = []
    right: list[tuple[str, float]] = []
    for image, prompt in zip(images, prompts, strict=True):
        clauses, detected = prompt.metadata["include"], detect(image)
        objects = [_best(detected, c["class"]) for c in clauses]
        colors = [None if d is None else d.color for d in objects]
        prompted_colors = [c["color"] for c in clauses]
        both_present = sorted(map(str, colors)) == sorted(prompted_colors)
        both.append((prompt.text, both_present))
        if both_present:
            right.append((prompt.text, colors == prompted_colors))
    return {"both objects and colours": _share(both), "then as prompted": _share(right)}


def measure_relations(model: TextToImageModel, *, seed: int, repeats: int = 6) -> dict[str, Any]:
    """Measure relations and colour owners on held-out prompts, without guidance.

    Args:
        seed: seed of the noise.
        repeats: images of each prompt.
    """
    result = {}
    for task, measure in (("position", positions), ("color_attr", colours)):
        entries = [entry for entry in prompts("held_out") if entry["tag"] == task] * repeats
        images = draw_shapes(model, entries, seed=seed)
        texts = [Prompt(entry["prompt"], metadata=entry) for entry in entries]
        result[task] = measure(list(images), texts, detect)
    return result
