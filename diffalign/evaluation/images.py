"""Images of prompts as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffalign.config import EvaluationConfig
from diffalign.core.files import aside
from diffalign.data.images import write_captions
from diffalign.data.prompts import Prompt
from diffalign.evaluation.pictures import image_grid
from diffalign.evaluation.score import Progress, evaluate_model, repeat_prompts
from diffalign.pipelines.base import TextToImageModel
from diffalign.types import no_reward

GRID = "grid.png"


def write_images(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    folder: Path,
    config: EvaluationConfig,
    *,
    progress: Progress | None = None,
    **sizes: Any,
) -> int:
    """Draw images of the prompts and return their number.

    Each image is written as PNG once it is drawn, then the captions, and a grid of all.
    """
    rows = repeat_prompts(prompts, config)
    texts = [p.text for p in rows]
    names = [file_name(i, text) for i, text in enumerate(texts)]
    folder.mkdir(parents=True, exist_ok=True)

    def write(part: slice, images: Tensor) -> None:
        for i, image in enumerate(images, part.start):
            with aside(folder / names[i]) as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")
        if progress is not None:
            progress(part.start + len(images), len(texts))

    evaluation = evaluate_model(model, prompts, no_reward, config, on_images=write, **sizes)
    write_captions(folder, dict(zip(names, rows, strict=True)))
    captions = [f"{i:04d} {text} (seed {config.seed})" for i, text in enumerate(texts)]
    grid = image_grid(evaluation.images, columns=config.images_per_prompt, captions=captions)
    with aside(folder / GRID) as file:
        grid.save(file)
    return len(texts)


def file_name(number: int, prompt: str) -> str:
    """Return the name of an image's file: its number, and what of its prompt a file name can hold."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return f"{number:04d}-{words}.png" if words else f"{number:04d}.png"
