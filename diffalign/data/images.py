"""Folders of images with captions, as they are found: any mode that Pillow reads, files that are broken."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.data.prompts import Prompt, parse_line

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLES = ("metadata.jsonl", "metadata.csv")
TEXT_KEYS = ("prompt", "text", "caption")
MAX_WAITING = 500_000_000
"""Values of images that wait for others of their size."""


class ImageFolderError(UserError, ValueError):
    """A folder that cannot be used; the message says what is expected."""


@dataclass(frozen=True)
class CaptionedImage:
    """A file and what it should show."""

    path: Path
    prompt: Prompt


def read_folder(folder: str | Path, *, flag: str = "--images") -> list[CaptionedImage]:
    """All images with a caption, in the order of their names.

    Captions come from `metadata.jsonl` or `metadata.csv` (columns `file_name` and prompt, text or caption: an image
    folder of datasets), of a GenEval folder from each prompt's, else from a .txt file beside each image; an image
    without one has an empty caption.

    Raises:
        ImageFolderError: there is no such folder, no image in it, or a table that is not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageFolderError(f"{flag}: {folder} is no folder")
    for name in TABLES:
        if (folder / name).is_file():
            rows = list(_rows(folder / name))
            if not rows:
                raise ImageFolderError(f"{folder / name} names no image")
            return rows
    files = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not _is_collage(p)
    )
    if not files:
        raise ImageFolderError(
            f"{flag}: no image in {folder}; expected {', '.join(sorted(SUFFIXES))}"
        )
    return [CaptionedImage(p, _beside(p)) for p in files]


def _beside(path: Path) -> Prompt:
    if path.parent.name == "samples":
        entry = _geneval(path.parents[1] / "metadata.jsonl")
        if entry is not None:
            return Prompt(str(entry["prompt"]), entry)
    file = path.with_suffix(".txt")
    found = file.read_text(encoding="utf-8-sig", errors="replace") if file.is_file() else ""
    text = found.strip()
    return Prompt(text, {"prompt": text})


def _is_collage(path: Path) -> bool:
    """What GenEval's script leaves beside a prompt's samples."""
    return path.parent.name.isdigit() and (path.parent / "metadata.jsonl").is_file()


@lru_cache(maxsize=64)  # the images of one prompt follow each other
def _geneval(file: Path) -> dict[str, Any] | None:
    """A prompt of GenEval's folder layout, where the file is one."""
    try:
        entry = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) and "prompt" in entry else None


def _rows(table: Path) -> Iterator[CaptionedImage]:
    try:
        entries = list((_csv if table.suffix == ".csv" else _jsonl)(table))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageFolderError(f"{table} is not readable: {error}") from error
    key = next((k for k in TEXT_KEYS if any(e.get(k) for _, e in entries)), None)
    for place, entry in entries:
        name = entry.get("file_name")
        if not name:
            raise ImageFolderError(f"{place} has no file_name")
        inside = os.path.normpath(str(name))
        if os.path.isabs(inside) or inside.startswith(".."):
            raise ImageFolderError(f"{place}: {name} is not inside the folder")
        # taken out: its key means a caption here, whatever it means to a reward
        caption = str(entry.pop(key, None) or "") if key is not None else ""
        yield CaptionedImage(table.parent / inside, Prompt(caption, {**entry, "prompt": caption}))


def _csv(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for entry in reader:
            yield f"{table}:{reader.line_num}", dict(entry)


def _jsonl(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{table}:{number}"
        entry = parse_line(line, place, error=ImageFolderError)
        if not isinstance(entry, dict):
            raise ImageFolderError(f"{place} must be an object with file_name and prompt")
        yield place, entry


def read_image(path: Path | bytes) -> Tensor:
    """(3, H, W) uint8 of a file or its contents, turned as its EXIF says; transparency on white, 16 bits scaled to 8,
    an animation's first frame.

    Raises:
        OSError: the file is missing, empty, cut or no image.
    """
    try:
        with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as file:
            file.load()
            image = _upright(file)
        if image.mode.startswith("I") or image.mode == "F":
            return _deep(np.asarray(image))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
        name = "image" if isinstance(path, bytes) else path
        raise OSError(f"{name}: {type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """As the EXIF says, if it can be read: a damaged one is no reason to lose the image."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image.copy()


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


def fit(
    pixels: Tensor, height: int, width: int, *, place: tuple[float, float] = (0.5, 0.5)
) -> tuple[Tensor, tuple[int, int]]:
    """(3, height, width) uint8 of (3, H, W): the least resizing that covers it, then a crop at `place` (0..1 from the
    top, from the left); also the crop's top and left. An image of that size stays as it is."""
    _, h, w = pixels.shape
    scale = max(height / h, width / w)
    if scale != 1:
        size = max(height, round(h * scale)), max(width, round(w * scale))
        resized = F.interpolate(
            pixels[None].float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        pixels = resized[0].round().clamp(0, 255).to(torch.uint8)
    top = round(place[0] * (pixels.shape[1] - height))
    left = round(place[1] * (pixels.shape[2] - width))
    return pixels[:, top : top + height, left : left + width], (top, left)


def batches(
    images: Sequence[CaptionedImage], *, size: int
) -> Iterator[tuple[list[int], Tensor | None, str | None]]:
    """(rows, (B, 3, H, W) pixels, None) of up to `size` readable images of one resolution, and ([row], None, why) for
    each that cannot be read. Never more than a few times `size` images, or one and MAX_WAITING values, are held."""
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    held = 0
    for row, image in enumerate(images):
        try:
            pixels = read_image(image.path)
        except OSError as error:
            yield [row], None, str(error) or type(error).__name__
            continue
        shape = tuple(pixels.shape)
        waiting.setdefault(shape, []).append((row, pixels))
        held += pixels.numel()
        while waiting and (len(waiting.get(shape, ())) >= size or held > MAX_WAITING):
            full = len(waiting.get(shape, ())) >= size
            largest = max(waiting, key=lambda s: len(waiting[s]) * math.prod(s))
            group = waiting.pop(shape if full else largest)
            held -= sum(p.numel() for _, p in group)
            yield _stack(group)
    for group in waiting.values():
        yield _stack(group)


def _stack(group: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor, None]:
    return [row for row, _ in group], torch.stack([p for _, p in group]), None
