"""Saving of a pipeline so that stock diffusers loads all its parts in one dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.pipelines.cards import DrawingCard

DTYPE = "float32"
"""Dtype in which diffusers loads its own models by default."""


def save_pipeline(
    pipeline: Any, folder: str | Path, *, card: DrawingCard | None = None, **kwargs: Any
) -> None:
    """Save a pipeline so that `DiffusionPipeline.from_pretrained` needs only its folder.

    Args:
        card: default settings of generation, for the verbs of this suite.
        kwargs: arguments of `save_pretrained`.
    """
    pipeline.save_pretrained(folder, **kwargs)
    agree_on_dtype(folder)
    if card is not None:
        card.save(Path(folder))


def agree_on_dtype(folder: str | Path) -> None:
    """Set the dtype in the configurations of a folder's text encoders to diffusers' default.

    Version 5 of transformers reads `dtype` from a model's configuration while diffusers loads float32, so that the
    parts of a folder would not fit together. The weights do not change, and an explicit dtype still takes precedence.
    """
    for file in sorted(Path(folder).glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "_class_name" not in config and _set_dtype(config):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any]) -> bool:
    """Set the dtype of a configuration and of nested ones; return True if it changed."""
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value != DTYPE:
            config[key], changed = DTYPE, True
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            changed = _set_dtype(value) or changed
    return changed
