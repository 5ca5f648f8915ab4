"""Preference and diversity on common prompts: rewards that the model was not trained on, and what collapses.

A reward's mean says little; its paired difference and win rate to a base do. Diversity within a prompt shows collapse,
and rises as well when images break, so it is read beside the rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.suite.base import Benchmark, DataFile, Measure, Replies
from diffalign.evaluation.suite.diversity import pairwise_distance, vendi
from diffalign.judges.base import Question, said
from diffalign.judges.packing import unpack

REWARD, FEATURES = "reward", "features"
DIVERSITY, VENDI = "diversity", "vendi"


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read one prompt a line, each once.

    DrawBench's copy in DiffusionNFT holds its 200 prompts five times.

    Raises:
        PromptError: the file holds no prompt.
    """
    return list({prompt.text: prompt for prompt in load_prompts(str(paths[0]))}.values())


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return the questions to all rewards at once, and to the feature network."""
    return [
        Question(REWARD, prompt.text, kind="reward", metadata=prompt.metadata),
        Question(FEATURES, "", kind="features"),
    ]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return every reward of every image, and the diversity of a prompt's images."""
    rows = []
    category = prompt.metadata.get("category")
    for number, replies in enumerate(images):
        reply = replies.get(REWARD)
        # the text names the rewards in the order of their numbers
        names = (reply.text or "").split(",") if reply is not None and reply.text else []
        for name, value in zip(names, reply.low if reply else (), strict=False):
            low, high = (value, value) if np.isfinite(value) else (-np.inf, np.inf)
            rows.append(Measure(f"reward/{name}", low, high, image=number))
            if category:
                rows.append(Measure(f"{name} of {category}", low, high, image=number))
        if not names:
            rows.append(Measure("reward/unknown", -np.inf, np.inf, image=number))
    vectors = [unpack(text) for replies in images if (text := said(replies.get(FEATURES)))]
    if len(images) > 1:
        whole = len(vectors) == len(images)
        n = len(images)
        spread = pairwise_distance(np.stack(vectors)) if whole else None
        number_of = vendi(np.stack(vectors)) if whole else None
        rows.append(_bounded(DIVERSITY, spread, 0.0, 2.0))
        rows.append(_bounded(VENDI, number_of, 1.0, float(n)))
    return rows


def _bounded(name: str, value: float | None, low: float, high: float) -> Measure:
    return Measure(name, low, high) if value is None else Measure(name, value, value)


DRAWBENCH = DataFile(
    "NVlabs/DiffusionNFT",
    "24af5554898d85e93efa492f42b5e9cdf4156e9b",
    "dataset/drawbench/test.txt",
    "9006b98feabb94b28a2bc0c88de42fd4f31a9ec3c2a19e308a02c5385b7172f0",
)
"""DrawBench's 200 prompts, each five times."""
BENCHMARK = Benchmark(
    name="preference",
    summary="rewards that were not trained on, and diversity within a prompt, on DrawBench's prompts",
    load=load,
    questions=questions,
    measures=measures,
    headline=DIVERSITY,
    files=(DRAWBENCH,),
    licence="DrawBench's own terms",
    images_per_prompt=4,
    scale=1.0,
    rewards=("pickscore", "hpsv2.1", "image_reward"),
    language="any",
    note="Raw rewards of different names do not compare; read the difference to a base and the share of pairs won.",
)
