"""Exact verifier of Shapes as a judge: it answers the questions of Shapes' own grammar, and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffalign.geneval.rules import Detection, plural, relative_position
from diffalign.judges.base import Judge, JudgeCard, Question, Reply, Task
from diffalign.shapes.verifier import detect
from diffalign.shapes.world import KINDS

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COUNT = re.compile(r"How many (\w+) are in the image\?")
_OBJECT = re.compile(r"(?:Is there a|Are there any) (\w+) in the image\?")
_COLOUR = re.compile(r"(?:Is|Are) the (\w+) (\w+)\?")
_PLACE = re.compile(r"(?:Is|Are) the (\w+) (left of|right of|above|below) the (\w+)\?")
_KINDS = {form: kind for kind in KINDS for form in (kind, plural(kind))}
_LINE = re.compile(r"^\d+\. (.+\?)$", re.MULTILINE)


def truth(question: str, objects: Sequence[Detection]) -> str | None:
    """Return the right answer to a question of Shapes' grammar, or None for another question."""
    if match := _COUNT.fullmatch(question):
        count = len(_named(objects, match[1]))
        return COUNTS[count] if count < len(COUNTS) else str(count)
    if match := _OBJECT.fullmatch(question):
        return _word(bool(_named(objects, match[1])))
    if match := _PLACE.fullmatch(question):
        first, second = _named(objects, match[1]), _named(objects, match[3])
        return _word(
            bool(first and second)
            and all(match[2] in relative_position(a.box, b.box) for a in first for b in second)
        )
    if match := _COLOUR.fullmatch(question):
        named = _named(objects, match[1])
        return _word(bool(named) and all(o.color == match[2] for o in named))
    return None


def _named(objects: Sequence[Detection], name: str) -> list[Detection]:
    return [o for o in objects if o.name == _KINDS.get(name)]


def _word(is_so: bool) -> str:
    return "Yes" if is_so else "No"


class ExactJudge(Judge):
    """Verifier of Shapes, whose answers are the truth about Shapes' images."""

    card = JudgeCard("exact", "shapes-verifier-1", ("words", "text"), "Shapes' own verifier")

    def answer(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return the true answers; an error for questions outside the grammar."""
        objects: dict[int, list[Detection]] = {}
        replies = []
        for question, images in tasks:
            image = images[0]
            if id(image) not in objects:
                objects[id(image)] = detect(_pixels(image))
            replies.append(_reply(question, objects[id(image)]))
        return replies


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def _reply(question: Question, objects: Sequence[Detection]) -> Reply:
    if question.kind == "text":
        answers = [truth(line, objects) for line in _LINE.findall(question.text)]
        if not answers or None in answers:
            return Reply(error="the verifier knows questions of Shapes only")
        return Reply(text=f"<score>{[int(a == 'Yes') for a in answers]}</score>")
    answer = truth(question.text.partition("\n")[0], objects)
    if answer is None:
        return Reply(error="the verifier knows questions of Shapes only")
    forms = {answer.lower(), str(COUNTS.index(answer)) if answer in COUNTS else answer.lower()}
    values = tuple(
        float(any(form.strip().lower() in forms for form in group)) for group in question.words
    )
    return Reply(text=answer, low=values, high=values)
