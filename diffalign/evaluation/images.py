"""Images of prompts as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.config import EvaluationConfig
from diffalign.data.images import write_captions
from diffalign.data.prompts import Prompt
from diffalign.evaluation.report import image_grid
from diffalign.evaluation.score import evaluate_model
from diffalign.pipelines.base import TextToImageModel
from diffalign.types import no_reward

GRID = "grid.png"


def write_images(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    folder: Path,
    config: EvaluationConfig,
    **sizes: Any,
) -> int:
    """Draw images of the prompts, write each as PNG, their captions and a grid of all, and return their number."""
    drawn = evaluate_model(model, prompts, no_reward, config, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    captions: dict[str, Prompt] = {}
    for i, (prompt, image) in enumerate(zip(drawn.prompts, drawn.images, strict=True)):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.text.lower()).strip("-")[:60]
        name = f"{i:04d}-{words}.png"
        image_grid(image[None], columns=1, gap=0).save(folder / name)
        captions[name] = prompt
    write_captions(folder, captions)
    image_grid(drawn.images, columns=config.images_per_prompt).save(folder / GRID)
    return len(drawn.prompts)
