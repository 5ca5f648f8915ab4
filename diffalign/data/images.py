"""Folders of images with captions, as they are found: any mode that Pillow reads, files that are broken."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffalign.data.prompts import Prompt
from diffalign.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLES = ("metadata.jsonl", "metadata.csv")
TEXT_KEYS = ("prompt", "text", "caption")


class ImageFolderError(UserError, ValueError):
    """A folder that cannot be used; the message says what is expected."""


@dataclass(frozen=True)
class CaptionedImage:
    """A file and what it should show."""

    path: Path
    prompt: Prompt


def read_folder(folder: str | Path) -> list[CaptionedImage]:
    """All images with a caption, in the order of their names.

    Captions come from `metadata.jsonl` or `metadata.csv` (columns `file_name` and prompt, text or caption: an image
    folder of datasets), else from a .txt file beside each image; an image without one has an empty caption.

    Raises:
        ImageFolderError: there is no such folder, no image in it, or a table that is not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageFolderError(f"--images: {folder} is no folder")
    for name in TABLES:
        if (folder / name).is_file():
            rows = list(_rows(folder / name))
            if not rows:
                raise ImageFolderError(f"{folder / name} names no image")
            return rows
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ImageFolderError(
            f"--images: no image in {folder}; expected {', '.join(sorted(SUFFIXES))}"
        )
    return [CaptionedImage(p, _beside(p)) for p in files]


def _beside(path: Path) -> Prompt:
    file = path.with_suffix(".txt")
    text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    return Prompt(text, {"prompt": text})


def _rows(table: Path) -> Iterator[CaptionedImage]:
    text = table.read_text(encoding="utf-8")
    if table.suffix == ".csv":
        entries = enumerate(csv.DictReader(text.splitlines()), 2)
    else:
        entries = (
            (n, _json(line, f"{table}:{n}"))
            for n, line in enumerate(text.splitlines(), 1)
            if line.strip()
        )
    for number, entry in entries:
        name = entry.get("file_name")
        if not name:
            raise ImageFolderError(f"{table}:{number} has no file_name")
        caption = next((str(entry[k]) for k in TEXT_KEYS if entry.get(k) is not None), "")
        path = (table.parent / str(name)).resolve()
        if not path.is_relative_to(table.parent.resolve()):
            raise ImageFolderError(f"{table}:{number}: {name} is not inside the folder")
        yield CaptionedImage(path, Prompt(caption, {"prompt": caption, **entry}))


def _json(line: str, place: str) -> dict:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ImageFolderError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ImageFolderError(f"{place} must be an object with file_name and prompt")
    return entry


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8, turned as its EXIF says; transparency on white, 16 bits scaled to 8, an animation's first frame.

    Raises:
        OSError: the file is missing, empty, cut or no image.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":
            return _deep(np.asarray(image))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error


def _deep(values: np.ndarray) -> Tensor:
    """(H, W) of 16-bit integers or of floats in 0..1 to grey (3, H, W) uint8."""
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        grey = values.clip(0, 1) * 255
    else:
        grey = values.clip(0, 65535) / 257
    pixels = torch.from_numpy(grey.round().astype(np.uint8))
    return pixels.expand(3, *pixels.shape).contiguous()


def batches(
    images: Sequence[CaptionedImage], *, size: int
) -> Iterator[tuple[list[int], Tensor | None, str | None]]:
    """(rows, (B, 3, H, W) pixels, None) of up to `size` readable images of one resolution, and ([row], None, why) for
    each that cannot be read."""
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for row, image in enumerate(images):
        try:
            pixels = read_image(image.path)
        except OSError as error:
            yield [row], None, str(error) or type(error).__name__
            continue
        group = waiting.setdefault(tuple(pixels.shape), [])
        group.append((row, pixels))
        if len(group) == size:
            yield _stack(waiting.pop(tuple(pixels.shape)))
    for group in waiting.values():
        yield _stack(group)


def _stack(group: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor, None]:
    return [row for row, _ in group], torch.stack([p for _, p in group]), None
