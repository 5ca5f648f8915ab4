"""GenEval's rules as pure functions of detections, without models, images or files.

Detections come from a detector on photographs or from the exact verifier on Shapes; the rules decide whether an image
shows what its prompt says. See Ghosh et al., "GenEval" (NeurIPS 2023), section 3. The continuous score is the one that
Flow-GRPO introduced as a training reward.
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
"""Least scores of a detection: for most tasks, and for counting."""
MAX_OBJECTS = 16
"""Largest number of detections of one class in one image; the best are used."""
POSITION_MARGIN = 0.1
"""Share of both objects' sizes that an offset must exceed to count."""


def plural(name: str) -> str:
    """Return the plural that GenEval's prompts use."""
    return name + ("es" if name.endswith("s") else "s")


def clause(name: str, count: int = 1, **more: Any) -> Metadata:
    """Return one object of a prompt's metadata."""
    return {"class": name, "count": count, **more}


def entry(task: str, include: list[Metadata], prompt: str, **more: Any) -> Metadata:
    """Return a prompt's metadata."""
    return {"tag": task, "include": include, **more, "prompt": f"a photo of {prompt}"}


@dataclass(frozen=True)
class Detection:
    """One object in an image.

    Attributes:
        name: class of the object.
        box: (x1, y1, x2, y2) in pixels, y downwards; x2 and y2 are one past the last pixel.
        score: confidence in 0..1.
        color: colour of the object, if known.
    """

    name: str
    box: tuple[float, float, float, float]
    score: float = 1.0
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Verdict on one image.

    Attributes:
        correct: result of the official rules.
        strict: result with exact counts.
        score: partial credit, at most 1, negative if far too many objects are shown.
        reasons: violations of the official rules.
    """

    correct: bool
    strict: bool
    score: float
    reasons: tuple[str, ...]


def relative_position(box: Sequence[float], target: Sequence[float]) -> frozenset[str]:
    """Return the relations of `box` to `target`, a subset of `RELATIONS`.

    A diagonal offset can give two relations; boxes with (nearly) the same centre have none.
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
    relations = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, holds in relations.items() if holds)


def confident(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> list[Detection]:
    """Return the detections that count for a prompt, best first.

    They are above the threshold of the prompt's task, at most 16 of a class.
    """
    least = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    counted: list[Detection] = []
    number: dict[str, int] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least and number.get(detection.name, 0) < MAX_OBJECTS:
            number[detection.name] = number.get(detection.name, 0) + 1
            counted.append(detection)
    return counted


def judge(
    detections: Sequence[Detection], metadata: Mapping[str, Any], *, compat: bool = False
) -> Verdict:
    """Judge the detections of one image by one prompt's GenEval metadata.

    Args:
        detections: detections of the image.
        metadata: the prompt's `include` and `exclude`.
        compat: whether to compute the continuous score as Flow-GRPO and AWM released it, where a wrong position counts
            as one wrong and one right part.
    """
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        by_class.setdefault(detection.name, []).append(detection)
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
        number = len(by_class.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return not reasons, reasons


def _continuous(
    by_class: dict[str, list[Detection]], metadata: Mapping[str, Any], *, compat: bool
) -> tuple[bool, float]:
    parts: list[float] = []
    strict = True
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", ()):
        count = clause["count"]
        objects = by_class.get(clause["class"], [])
        parts.append(1 - abs(count - len(objects)) / count)
        matched = len(objects) == count
        if "color" in clause:
            right = sum(d.color == clause["color"] for d in objects) if matched else 0
            parts.append(right / count)
            matched = matched and right == count
        if "position" in clause:
            relation, index = clause["position"]
            comparable = matched and groups[index] is not None
            matched = matched and _all_in_relation(objects, groups[index], relation)
            parts.append(float(matched))
            if compat and comparable and not matched:
                parts.append(1.0)
        strict = strict and matched
        groups.append(objects if matched else None)
    return strict, sum(parts) / max(len(parts), 1)


def _all_in_relation(
    objects: Sequence[Detection], targets: Sequence[Detection] | None, relation: str
) -> bool:
    return targets is not None and all(
        relation in relative_position(a.box, b.box) for a in objects for b in targets
    )


def summarize(tasks: Sequence[str], correct: Sequence[bool | float]) -> dict[str, float]:
    """Return the accuracy of each task and `overall`, the mean of the tasks."""
    if len(tasks) != len(correct):
        raise ValueError(f"There are {len(tasks)} tasks but {len(correct)} results.")
    grouped: dict[str, list[float]] = {}
    for task, value in zip(tasks, correct, strict=True):
        grouped.setdefault(task, []).append(float(value))
    order = [t for t in TASKS if t in grouped] + sorted(set(grouped) - set(TASKS))
    result = {task: sum(grouped[task]) / len(grouped[task]) for task in order}
    result["overall"] = sum(result.values()) / max(len(result), 1)
    return result
