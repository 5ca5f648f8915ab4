"""Save a pipeline so that stock diffusers loads it in one dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.pipelines.cards import DrawingCard

DTYPE = "float32"
"""The dtype in which diffusers loads its own models by default."""


def save_pipeline(
    pipeline: Any, folder: str | Path, *, card: DrawingCard | None = None, **kwargs: Any
) -> None:
    """Write a pipeline's folder for `DiffusionPipeline.from_pretrained(folder)` without further arguments.

    Args:
        card: how the model is drawn with by default, for the verbs of this suite.
        kwargs: of `save_pretrained`.
    """
    pipeline.save_pretrained(folder, **kwargs)
    agree_on_dtype(folder)
    if card is not None:
        card.save(Path(folder))


def agree_on_dtype(folder: str | Path) -> None:
    """Tell transformers to load a folder's text encoders in the default dtype of diffusers.

    Version 5 of transformers reads `dtype` from a model's configuration, diffusers loads float32: left to themselves a
    folder's parts do not fit together. The weights stay what they are; a dtype that is asked for wins.
    """
    for file in sorted(Path(folder).glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "_class_name" not in config and _set_dtype(config):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any]) -> bool:
    """Set the dtype of a configuration and of those inside it; say whether that changed it."""
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value != DTYPE:
            config[key], changed = DTYPE, True
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            changed = _set_dtype(value) or changed
    return changed
