"""The evaluation of a base, kept beside its run: one that is resumed does not draw hundreds of images again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffalign.core.files import aside
from diffalign.core.fingerprint import of_json
from diffalign.data.prompts import Prompt, told
from diffalign.evaluation.score import Evaluation

KEY, FOUND = "key", "found"
"""Keys of the file's header: a digest of what was evaluated, and its figures."""
COLUMN = "score:"
"""Prefix of the tensors that hold scores per image."""


def _digest(key: Any, prompts: Sequence[Prompt]) -> str:
    return of_json([key, told(prompts)], default=str)


def keep(evaluation: Evaluation, file: Path, *, key: Any) -> None:
    """Write an evaluation, with the images that it has, aside and rename it.

    The argument `key` (JSON, other values as texts) says what was evaluated, besides the prompts.
    """
    rows = range(len(evaluation.prompts)) if evaluation.rows is None else evaluation.rows
    tensors = {
        "images": evaluation.images.contiguous(),
        "rows": torch.tensor(list(rows)),
        "rewards": torch.from_numpy(evaluation.rewards),
        **{COLUMN + name: torch.from_numpy(values) for name, values in evaluation.scores.items()},
    }
    header = {KEY: _digest(key, evaluation.prompts), FOUND: json.dumps(evaluation.to_dict())}
    with aside(file) as path:
        save_file(tensors, path, metadata=header)


def kept(file: Path, prompts: list[Prompt], *, key: Any) -> Evaluation | None:
    """Return the evaluation that `keep` wrote for the same prompts and key.

    There is one prompt for every image. Return None where no such evaluation is there.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            if header.get(KEY) != _digest(key, prompts):
                return None
            # clones, for what the file maps is gone when somebody writes into it
            tensors = {n: opened.get_tensor(n).clone() for n in opened.keys()}  # noqa: SIM118
    except SafetensorError:  # cut by something that is not us: it can be made again
        return None
    scores = {
        name.removeprefix(COLUMN): values.numpy()
        for name, values in tensors.items()
        if name.startswith(COLUMN)
    }
    if not scores:
        # written before scores were kept: without them no difference has an interval
        return None
    figures = json.loads(header[FOUND])
    return Evaluation(
        prompts,
        tensors["images"],
        tensors["rewards"].numpy(),
        means=figures["means"],
        tasks=figures["tasks"],
        failed=figures["failed"],
        not_finite=figures["not_finite"],
        rows=tuple(tensors["rows"].tolist()),
        scores=scores,
    )
