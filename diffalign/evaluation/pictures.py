"""Pictures for people: grids of images with captions, and images inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEGIBLE = 160
"""Pixels of an image's longer side below which a grid enlarges the image."""
LARGEST = 40_000_000
"""Pixels of a grid's images above which a grid shrinks them."""
SHOWN = 256
"""Pixels of the longer side at which a page shows a large image."""
CAPTION_LINES = 4
INK = "#1c1f24"


def enlargement(height: int, width: int) -> int:
    """Return the whole factor that makes an image legible; 1 for an image that is."""
    return max(1, -(-LEGIBLE // max(height, width)))


def image_grid(
    images: Tensor, *, columns: int, gap: int = 2, captions: Sequence[str] | None = None
) -> Image.Image:
    """Return (N, 3, H, W) uint8 as one picture, with captions.

    Images go row by row. Small images are enlarged by a whole factor, so that each of their pixels is a square. Very
    many large images are shrunk until they fit.

    Args:
        captions: one per image (N,); None for a grid without text.
    """
    n, _, h, w = images.shape
    height, width = _cell(n, h, w)
    pixels = images.permute(0, 2, 3, 1).numpy()
    filter_ = Image.Resampling.NEAREST if height >= h else Image.Resampling.LANCZOS
    tiles = [Image.fromarray(p).resize((width, height), filter_) for p in pixels]
    font = ImageFont.load_default(size=max(12, width // 40))
    lines = [wrapped(c, font, width) for c in captions] if captions is not None else [[]] * n
    line_height = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 14
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    text_heights = [line_height * max(len(lines[i]) for i in row) for row in rows]
    total = sum(height + t + gap for t in text_heights) + gap
    canvas = Image.new("RGB", (columns * (width + gap) + gap, total), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, i in enumerate(row):
            left = column * (width + gap) + gap
            canvas.paste(tiles[i], (left, top))
            for number, line in enumerate(lines[i]):
                draw.text((left, top + height + number * line_height), line, fill=INK, font=font)
        top += height + text_height + gap
    return canvas


def _cell(n: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of each of n images in a grid."""
    factor = enlargement(height, width)
    if factor > 1:
        return height * factor, width * factor
    shrink = min(1.0, (LARGEST / (n * height * width)) ** 0.5)
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def labelled_rows(rows: Mapping[str, Tensor], captions: Sequence[str]) -> Image.Image:
    """Return a picture of named rows of images (N, 3, H, W) uint8, with captions.

    The rows show the same prompts in the same order, such as a model before and after training.

    Raises:
        ValueError: a row has more or fewer images than there are captions.
    """
    wrong = [name for name, images in rows.items() if len(images) != len(captions)]
    if wrong:
        raise ValueError(f"rows of other lengths than {len(captions)} captions: {', '.join(wrong)}")
    last = list(rows)[-1]
    grids = {
        name: image_grid(
            images, columns=len(images), captions=captions if name == last else None, gap=4
        )
        for name, images in rows.items()
    }
    font = ImageFont.load_default(size=14)
    margin = 8 + round(max(font.getlength(name) for name in rows))
    height = sum(g.height for g in grids.values())
    canvas = Image.new("RGB", (margin + max(g.width for g in grids.values()), height), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for name, grid in grids.items():
        draw.text((4, top + 8), name, fill=INK, font=font)
        canvas.paste(grid, (margin, top))
        top += grid.height
    return canvas


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """Return a text in lines of at most `width` pixels. A long text ends in an ellipsis."""
    lines: list[str] = []
    for word in " ".join(text.split()).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} …"]
    return [_cut(line, font, width) for line in lines if line]


def _cut(line: str, font: Any, width: int) -> str:
    """Return a line without the letters that do not fit."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def png_uri(pixels: np.ndarray) -> str:
    """Return (H, W, 3) uint8 as a data URI, pixel for pixel."""
    return _uri(Image.fromarray(pixels), "png", optimize=True)


@dataclass(frozen=True)
class PageImage:
    """Image inside a page: its data URI, the width in pixels at which it is shown, and whether it is enlarged."""

    uri: str
    width: int
    tiny: bool


def page_image(pixels: np.ndarray) -> PageImage:
    """Return (H, W, 3) uint8 for a page: a tiny image pixel for pixel, a large one as a thumbnail."""
    height, width = pixels.shape[:2]
    factor = enlargement(height, width)
    if factor > 1:
        return PageImage(png_uri(pixels), width * factor, tiny=True)
    image = Image.fromarray(pixels)
    # twice as many pixels as are shown, for screens that have them
    image.thumbnail((2 * SHOWN, 2 * SHOWN))
    shown = min(width, round(SHOWN * width / max(height, width)))
    return PageImage(_uri(image, "jpeg", quality=92), shown, tiny=False)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` items, spread evenly."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
