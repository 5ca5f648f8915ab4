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


def keep(found: Evaluation, file: Path, *, key: Any) -> None:
    """Write an evaluation aside and rename it; of its images those that it has. `key` (JSON, other values as texts):
    what it is of, besides its prompts."""
    rows = range(len(found.prompts)) if found.rows is None else found.rows
    tensors = {
        "images": found.images.contiguous(),
        "rows": torch.tensor(list(rows)),
        "rewards": torch.from_numpy(found.rewards),
        **{COLUMN + name: torch.from_numpy(values) for name, values in found.scores.items()},
    }
    header = {KEY: _digest(key, found.prompts), FOUND: json.dumps(found.to_dict())}
    with aside(file) as path:
        save_file(tensors, path, metadata=header)


def kept(file: Path, prompts: list[Prompt], *, key: Any) -> Evaluation | None:
    """What `keep` wrote for the same prompts, one for every image, and the same key; None where that is not there."""
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
    found = json.loads(header[FOUND])
    return Evaluation(
        prompts,
        tensors["images"],
        tensors["rewards"].numpy(),
        means=found["means"],
        tasks=found["tasks"],
        failed=found["failed"],
        not_finite=found["not_finite"],
        rows=tuple(tensors["rows"].tolist()),
        scores=scores,
    )
