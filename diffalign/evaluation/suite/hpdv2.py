"""HPDv2's benchmark: four styles under rewards, by style (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffalign.core.text import read_json
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite import preference
from diffalign.evaluation.suite.base import DataFile, SuiteError

STYLES = ("anime", "concept-art", "paintings", "photo")


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read one JSON list of texts for each style.

    Raises:
        SuiteError: a file is not such a list.
    """
    items = []
    for path, style in zip(paths, STYLES, strict=True):
        texts = read_json(path, error=SuiteError)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise SuiteError(f"{path} must hold a list of prompts, one text each")
        items += [Prompt(text, {"prompt": text, "category": style}) for text in texts]
    return items


BENCHMARK = replace(
    preference.BENCHMARK,
    name="hpdv2",
    summary="rewards and diversity on HPDv2's benchmark, by style",
    load=load,
    # the commit is not pinned, because the files have not been seen; results hold their digests
    files=tuple(
        DataFile("datasets/zhwang/HPDv2", "", f"benchmark/{style}.json", None) for style in STYLES
    ),
    licence="Apache-2.0 (code)",
    images_per_prompt=1,
    headline="reward/hpsv2.1",
    rewards=("hpsv2.1", "pickscore", "image_reward"),
)
