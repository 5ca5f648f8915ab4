"""Questions about the images of a benchmark: their own, and those of other prompts for the chance line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.data.prompts import Prompt
from diffalign.evaluation.geneval import sample_path
from diffalign.evaluation.suite.answers import Ask
from diffalign.evaluation.suite.base import QUICK, Benchmark


def shuffled(benchmark: Benchmark, prompts: Sequence[Prompt], variant: str) -> dict[int, int]:
    """Return another prompt for an eighth of all, with the same number of questions.

    Rewards and features have no chance line.
    """
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        questions = benchmark.questions(prompt, variant)
        if questions and questions[0].kind in ("words", "text"):
            groups.setdefault(len(questions), []).append(i)
    partner: dict[int, int] = {}
    for members in groups.values():
        shift = max(1, len(members) // 2)
        for n, i in enumerate(members):
            other = members[(n + shift) % len(members)]
            if prompts[other].text != prompts[i].text:
                partner[i] = other
    chosen_rows = sorted(partner)
    few = -(-len(prompts) // QUICK)
    picks = [chosen_rows[n * len(chosen_rows) // few] for n in range(min(few, len(chosen_rows)))]
    return {i: partner[i] for i in picks}


def asks_of(
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    partner: Mapping[int, int],
    pictures: Path,
    count: int,
    variant: str,
) -> list[Ask]:
    """Return the questions about the images of prompts.

    Args:
        partner: number of the prompt whose questions are asked, by the number of the prompt of the images.
        pictures: folder of the images.
        count: images of each prompt.
    """
    asks = []
    for i, j in partner.items():
        questions = benchmark.questions(prompts[j], variant)
        asks += [Ask(sample_path(pictures, i, k), j, k, q) for k in range(count) for q in questions]
    return asks
