"""GenEval's rules as pure functions of detections: no model, no image, no file.

Whatever finds the objects (a detector on photographs, the exact verifier on Shapes), these rules decide whether an
image shows what its prompt asks for. Ghosh et al., "GenEval" (NeurIPS 2023), section 3; the continuous score is the
one that Flow-GRPO introduced as a training reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Metadata = dict[str, Any]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
    "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, "
    "baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, "
    "knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, "
    "chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, "
    "computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = tuple(_NAMES.split(", "))
"""COCO's 80 classes in COCO's order, by the names that GenEval's prompts use."""
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""A detection counts from this score on; when a prompt asks for a number, from the second."""
MAX_OBJECTS = 16
"""Of one class in one image, the best."""
POSITION_MARGIN = 0.1
"""Share of both objects' sizes that an offset must exceed before it counts."""


def plural(name: str) -> str:
    """As GenEval's prompts have it."""
    return name + ("es" if name.endswith("s") else "s")


def clause(name: str, count: int = 1, **more: Any) -> Metadata:
    """An object of a prompt's metadata."""
    return {"class": name, "count": count, **more}


def entry(task: str, include: list[Metadata], prompt: str, **more: Any) -> Metadata:
    """A prompt's metadata."""
    return {"tag": task, "include": include, **more, "prompt": f"a photo of {prompt}"}


@dataclass(frozen=True)
class Detection:
    """One object found in an image.

    `box` is (x1, y1, x2, y2) in pixels, y downwards, x2 and y2 one past the last pixel; `score` is in 0..1.
    """

    name: str
    box: tuple[float, float, float, float]
    score: float = 1.0
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`correct`: the official rules; `strict`: counts must be exact; `score`: partial credit, at most 1, can be
    negative when far too many objects are shown."""

    correct: bool
    strict: bool
    score: float
    reasons: tuple[str, ...]


def relative_position(box: Sequence[float], target: Sequence[float]) -> frozenset[str]:
    """Where `box` lies as seen from `target`: a subset of {"left of", "right of", "above", "below"}.

    A diagonal offset can yield two relations, boxes with (nearly) the same centre yield none.
    """
    offset = [(box[i] + box[i + 2] - target[i] - target[i + 2]) / 2 for i in (0, 1)]
    size = [box[i + 2] - box[i] + target[i + 2] - target[i] for i in (0, 1)]
    shrunk = [
        math.copysign(max(abs(o) - POSITION_MARGIN * s, 0.0), o)
        for o, s in zip(offset, size, strict=True)
    ]
    length = math.hypot(*offset)
    if length == 0:
        return frozenset()
    dx, dy = (s / length for s in shrunk)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, holds in found.items() if holds)


def confident(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> list[Detection]:
    """Those that count for a prompt: above the threshold of its task, at most 16 of a class, best first."""
    least = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    kept: list[Detection] = []
    number: dict[str, int] = {}
    for found in sorted(detections, key=lambda d: -d.score):
        if found.score > least and number.get(found.name, 0) < MAX_OBJECTS:
            number[found.name] = number.get(found.name, 0) + 1
            kept.append(found)
    return kept


def judge(
    detections: Sequence[Detection], metadata: Mapping[str, Any], *, compat: bool = False
) -> Verdict:
    """Judge what was found in one image against one prompt's GenEval metadata (`include`, `exclude`).

    `compat`: the continuous score as Flow-GRPO and AWM released it, where a wrong position counts as a part that is
    wrong and another that is right.
    """
    by_class: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: -d.score):
        by_class.setdefault(found.name, []).append(found)
    correct, reasons = _official(by_class, metadata)
    strict, score = _continuous(by_class, metadata, compat=compat)
    return Verdict(correct=correct, strict=strict, score=score, reasons=tuple(reasons))


def _official(
    by_class: dict[str, list[Detection]], metadata: Mapping[str, Any]
) -> tuple[bool, list[str]]:
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        best = by_class.get(name, [])[:count]
        reason = None
        if len(best) < count:
            reason = f"expected {name}>={count}, found {len(best)}"
        elif "color" in clause and sum(d.color == clause["color"] for d in best) < count:
            reason = f"expected {clause['color']} {name}>={count}, found {[d.color for d in best]}"
        elif "position" in clause:
            relation, index = clause["position"]
            if not _all_in_relation(best, groups[index], relation):
                reason = f"expected {name} {relation} target {index}"
        if reason:
            reasons.append(reason)
        groups.append(None if reason else best)
    for clause in metadata.get("exclude", ()):
        found = len(by_class.get(clause["class"], []))
        if found >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return not reasons, reasons


def _continuous(
    by_class: dict[str, list[Detection]], metadata: Mapping[str, Any], *, compat: bool
) -> tuple[bool, float]:
    parts: list[float] = []
    strict = True
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", ()):
        count = clause["count"]
        found = by_class.get(clause["class"], [])
        parts.append(1 - abs(count - len(found)) / count)
        matched = len(found) == count
        if "color" in clause:
            right = sum(d.color == clause["color"] for d in found) if matched else 0
            parts.append(right / count)
            matched = matched and right == count
        if "position" in clause:
            relation, index = clause["position"]
            comparable = matched and groups[index] is not None
            matched = matched and _all_in_relation(found, groups[index], relation)
            parts.append(float(matched))
            if compat and comparable and not matched:
                parts.append(1.0)
        strict = strict and matched
        groups.append(found if matched else None)
    return strict, sum(parts) / max(len(parts), 1)


def _all_in_relation(
    objects: Sequence[Detection], targets: Sequence[Detection] | None, relation: str
) -> bool:
    return targets is not None and all(
        relation in relative_position(a.box, b.box) for a in objects for b in targets
    )


def summarize(tasks: Sequence[str], correct: Sequence[bool | float]) -> dict[str, float]:
    """Accuracy of each task that occurs, and `overall`: the plain mean of the tasks, as GenEval reports it."""
    if len(tasks) != len(correct):
        raise ValueError(f"{len(tasks)} tasks but {len(correct)} results")
    grouped: dict[str, list[float]] = {}
    for task, value in zip(tasks, correct, strict=True):
        grouped.setdefault(task, []).append(float(value))
    order = [t for t in TASKS if t in grouped] + sorted(set(grouped) - set(TASKS))
    result = {task: sum(grouped[task]) / len(grouped[task]) for task in order}
    result["overall"] = sum(result.values()) / max(len(result), 1)
    return result
