"""Known-answer check: rendered scenes with known answers, asked before the first image of a benchmark.

A wrong model, a thinking mode that is on, a lost image or a template without images shows here, not in a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffalign.evaluation.suite.geneval2 import ONE_WORD, forms
from diffalign.evaluation.suite.shapes import WORDS, clause_questions
from diffalign.evaluation.suite.words import WORD, bag
from diffalign.geneval.rules import plural
from diffalign.judges.base import (
    NO,
    YES,
    Judge,
    JudgeError,
    Question,
    Reply,
    Task,
    probability,
    said,
)
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import COLORS, IMAGE_SIZE, KINDS, render, sample_scene

YES_NO, COUNTS, TEXTS = 48, 16, 6
SIZE = IMAGE_SIZE * 7
"""Side of the rendered images in pixels, a size that vision-language models are used to."""
LEAST_RIGHT = 0.8
YES_RATES = (0.3, 0.7)
LINES = ("OPEN DAILY", "Fresh bread", "Platform 9", "HELLO WORLD", "No parking", "Green tea")
READ = "Transcribe all text in the image, and write nothing else."


def check_judge(judge: Judge, *, trust: bool = False) -> dict[str, Any]:
    """Ask questions with known answers and return the share of right replies.

    Args:
        trust: go on with a judge that fails.

    Returns:
        `right`, `asked`, `yes_rate`, and `texts` for the words read in six texts, for what the judge answers.

    Raises:
        JudgeError: fewer than 80 % of the yes/no questions are right, or nearly all replies are the same.
    """
    result: dict[str, Any] = {}
    if "words" in judge.card.kinds:
        tasks, truths = _scenes()
        replies = judge.answer(tasks)
        result = _judged(replies, truths)
        problem = _problem(result)
        if problem and not trust:
            first = next((r.error for r in replies if r.error), None)
            raise JudgeError(
                f"judge={judge.card.name}: {problem}{f' ({first})' if first else ''}. Check the model, its thinking "
                "mode and that it sees images, or set `trust_judge`"
            )
    if "text" in judge.card.kinds and judge.card.name != "exact":
        result["texts"] = _read_texts(judge)
    return result


def _scenes() -> tuple[list[Task], list[str]]:
    """Return questions about rendered scenes, and their answers: as many yes as no."""
    rng = np.random.default_rng(2026)
    entries = [entry for entry in prompts("held_out") if entry["tag"] in ("colors", "two_object")]
    counted = [entry for entry in prompts("held_out") if entry["tag"] == "counting"]
    tasks: list[Task] = []
    truths: list[str] = []
    for number in range(YES_NO):
        entry = entries[number % len(entries)]
        scene = sample_scene(entry, rng)
        shown = {item.kind for item in scene}
        truth = "Yes" if number % 2 == 0 else "No"
        absent = [kind for kind in KINDS if kind not in shown]
        kinds = sorted(shown) if truth == "Yes" else absent
        kind = kinds[number % len(kinds)]
        text = f"Are there any {plural(kind)} in the image?"
        if number % 4 > 1 and truth == "Yes":
            text = f"Is the {scene[0].kind} {scene[0].color}?"
        elif number % 4 > 1:
            others = [color for color in COLORS if color != scene[0].color]
            text = f"Is the {scene[0].kind} {others[number % len(others)]}?"
        tasks.append(
            (_question(number, text, (YES, NO)), (Image.fromarray(render(scene, size=SIZE)),))
        )
        truths.append(truth)
    for number in range(COUNTS):
        entry = counted[number % len(counted)]
        text, answer, _ = clause_questions(entry)[0]
        scene = sample_scene(entry, rng)
        groups = tuple(forms(word) for word in WORDS.values())
        tasks.append(
            (_question(YES_NO + number, text, groups), (Image.fromarray(render(scene, size=SIZE)),))
        )
        truths.append(answer)
    return tasks, truths


def _question(number: int, text: str, groups: tuple[tuple[str, ...], ...]) -> Question:
    return Question(f"known{number}", f"{text}\n{ONE_WORD}", words=groups)


def _judged(replies: Sequence[Reply], truths: Sequence[str]) -> dict[str, Any]:
    right = []
    yes = []
    for reply, truth in zip(replies, truths, strict=True):
        names = ["Yes", "No"] if truth in ("Yes", "No") else list(WORDS.values())
        lows = [probability(reply, i)[0] for i in range(len(names))]
        best = names[int(np.argmax(lows))] if max(lows) > 0 else ""
        right.append(best == truth)
        if truth in ("Yes", "No"):
            yes.append(best == "Yes")
    return {
        "asked": len(right),
        "right": sum(right),
        "yes_no_right": sum(right[: len(yes)]),
        "yes_no_asked": len(yes),
        "yes_rate": sum(yes) / len(yes),
        "unanswered": sum(reply.error is not None for reply in replies),
    }


def _problem(result: dict[str, Any]) -> str:
    share = result["yes_no_right"] / result["yes_no_asked"]
    if share < LEAST_RIGHT:
        return (
            f"{result['yes_no_right']} of {result['yes_no_asked']} known yes/no questions are right"
        )
    if not YES_RATES[0] <= result["yes_rate"] <= YES_RATES[1]:
        return f"{result['yes_rate']:.0%} of its answers are yes where half should be"
    return ""


def _read_texts(judge: Judge) -> float:
    """Return the share of words that a judge reads in six printed texts."""
    font = ImageFont.load_default(size=48)
    tasks: list[Task] = []
    for number, line in enumerate(LINES[:TEXTS]):
        image = Image.new("RGB", (SIZE, SIZE // 2), "white")
        ImageDraw.Draw(image).text((30, 80), line, fill="black", font=font)
        tasks.append((Question(f"text{number}", READ, kind="text", max_tokens=64), (image,)))
    hits = total = 0
    for reply, line in zip(judge.answer(tasks), LINES, strict=True):
        seen = bag(said(reply), WORD).counts
        target = bag(line, WORD).counts
        hits += sum((seen & target).values())
        total += sum(target.values())
    return hits / total
