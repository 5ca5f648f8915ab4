"""Images of prompts as files."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffalign.core.files import aside
from diffalign.data.images import write_captions
from diffalign.data.prompts import Prompt
from diffalign.evaluation.pictures import image_grid
from diffalign.evaluation.score import Progress, evaluate_model, repeat_prompts
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.types import no_reward

logger = logging.getLogger(__name__)

GRID = "grid.png"
LONGEST = 60
"""Bytes of a prompt in a file name."""


def write_images(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    folder: Path,
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw images of the prompts and return their files.

    Each image is written as PNG once it is drawn, then the captions, and a grid of all. A warning names the files of
    an earlier call that were replaced.
    """
    rows = repeat_prompts(prompts, drawing)
    texts = [p.text for p in rows]
    names = [file_name(i, text) for i, text in enumerate(texts)]
    replaced = [name for name in (*names, GRID) if (folder / name).exists()]
    folder.mkdir(parents=True, exist_ok=True)

    def write(part: slice, images: Tensor) -> None:
        for i, image in enumerate(images, part.start):
            with aside(folder / names[i]) as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")
        if progress is not None:
            progress(part.start + len(images), len(texts))

    if progress is not None:
        progress(0, len(texts))
    evaluation = evaluate_model(model, prompts, no_reward, drawing, on_images=write)
    write_captions(folder, dict(zip(names, rows, strict=True)))
    # an image is drawn again by its number and the seed of all: its noise depends on both
    captions = [f"image {i:04d} of seed {drawing.seed}: {text}" for i, text in enumerate(texts)]
    grid = image_grid(evaluation.images, columns=drawing.images_per_prompt, captions=captions)
    with aside(folder / GRID) as file:
        grid.save(file)
    if replaced:
        logger.warning("%s: replaced %s", folder, ", ".join(replaced))
    return [folder / name for name in names]


def file_name(number: int, prompt: str) -> str:
    """Return the name of an image's file: its number, and the words of its prompt in any script."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    short = words.encode()[:LONGEST].decode(errors="ignore").strip("-")
    return f"{number:04d}-{short}.png" if short else f"{number:04d}.png"
