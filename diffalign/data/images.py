"""Reader of folders of captioned images.

Images may have any mode that Pillow reads, and broken files are reported one by one.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.core.files import write_json_lines
from diffalign.core.text import parse_json, read_json_lines, read_text, unusable
from diffalign.data.folders import Folder, say_once, walk_images
from diffalign.data.prompts import Prompt
from diffalign.data.tables import Row, read_rows

TABLES = (*("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet", "metadata.json"),)
"""Names of caption tables; only the first that a folder has is read."""
OTHER_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")
CAPTION_SUFFIXES = (".txt", ".caption")
TEXT_KEYS = ("prompt", "text", "caption")
MAX_WAITING = 500_000_000
"""Largest number of pixel values that `batches` holds while it collects images of one size."""
MAX_PIXELS = 2**30
MAX_PNG_TEXT = 2**28
"""Largest size in bytes of a text or profile in a PNG.

All texts and profiles of a file together may have four times that size.
"""


class ImageFolderError(UserError, ValueError):
    """Image folder that cannot be used; the message says what is expected."""


@dataclass(frozen=True)
class CaptionedImage:
    """Image file and its prompt."""

    path: Path
    prompt: Prompt


def read_folder(folder: str | Path, *, setting: str = "images") -> list[CaptionedImage]:
    """Return a folder's images with their captions, and log files that are left out.

    Captions come from three sources:

    - tables in the folder or below it, as in an image folder of `datasets`: `metadata.jsonl`, `.csv`, `.tsv`,
      `.parquet` or `.json` with a column `file_name` and a column prompt, text or caption;
    - in a GenEval folder, the `metadata.jsonl` of each prompt;
    - otherwise a .txt or .caption file beside each image, `1.txt` or `1.png.txt`. Without one the caption is empty.

    Images of a table keep its order; other images are sorted by name.

    Args:
        setting: name of the setting that holds the folder, for errors.

    Raises:
        ImageFolderError: the folder does not exist or holds no image, or a table or caption is not readable.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ImageFolderError(f"{root} is no folder. Name one that exists", setting=setting)
    listing = walk_images(root, error=ImageFolderError)
    images = listing.images
    geneval = {
        p.parent: entry
        for p in listing.files
        if p.name == TABLES[0] and (entry := _geneval(p)) is not None
    }
    tables = _tables(listing, without=geneval)
    rows = [row for table in tables for row in _captioned(table) if row.path not in listing.gone]
    named = {row.path for row in rows}
    below = {table.parent for table in tables}
    listing.leave_out(
        (p for p in images if p not in named and not below.isdisjoint(p.parents)),
        "named in no row of the table above them",
    )
    # GenEval's script writes grids beside a prompt's samples
    listing.leave_out((p for p in images if p.parent in geneval), "made of the other images")
    listing.report()
    beside = _Captions(listing)
    rest = [p for p in listing.images if p not in named]
    if not rows and not rest:
        raise ImageFolderError(listing.without_image(), setting=setting)
    return rows + [CaptionedImage(p, _of_geneval(p, geneval) or beside.of(p)) for p in rest]


def write_captions(folder: Path, prompts: Mapping[str, Prompt]) -> None:
    """Write file names and prompts into `metadata.jsonl`; keep rows of other images."""
    file = folder / TABLES[0]
    rows = {
        name: {"file_name": name, **p.metadata, "prompt": p.text} for name, p in prompts.items()
    }
    before = read_json_lines(file, error=ImageFolderError) if file.is_file() else []
    others = [
        row
        for row in before
        if row.get("file_name") not in rows and (folder / str(row.get("file_name"))).is_file()
    ]
    write_json_lines(file, (*others, *rows.values()))


def require_captions(images: Sequence[CaptionedImage], folder: str | Path, *, why: str) -> None:
    """Raise ImageFolderError if no image has a caption.

    Args:
        why: names the reason why captions are needed.
    """
    if any(image.prompt.text.strip() for image in images):
        return
    others = [
        p.relative_to(folder).as_posix()
        for p in walk_images(Path(folder), error=ImageFolderError).of_type(OTHER_TABLES)
        if p.name.lower() not in TABLES
    ]
    unread = f"; {', '.join(others[:3])} is not read under that name" if others else ""
    raise ImageFolderError(
        f"no image of {folder} has a caption, and {why}: give it a {TABLES[0]} with file_name and text, or a .txt "
        f"file beside each image (docs/data.md){unread}"
    )


def _tables(listing: Folder, *, without: dict[Path, Any]) -> list[Path]:
    """Return the caption tables, the first of each folder; leave the others out."""
    by_folder: dict[Path, list[Path]] = {}
    for path in listing.files:
        if path.name.lower() in TABLES and path.parent not in without:
            by_folder.setdefault(path.parent, []).append(path)
    tables = []
    for files in by_folder.values():
        first, *others = sorted(files, key=lambda p: TABLES.index(p.name.lower()))
        listing.leave_out(others, f"beside {first.name}, which is read")
        tables.append(first)
    return tables


class _Captions:
    """Caption files beside images, found without regard to case."""

    def __init__(self, listing: Folder) -> None:
        self.files = {
            (p.parent, p.name.lower()): p for p in reversed(listing.of_type(CAPTION_SUFFIXES))
        }

    def of(self, image: Path) -> Prompt:
        """Return the caption of an image, or an empty one without a caption file."""
        stems = (image.name, image.stem)
        names = (f"{stem}{suffix}".lower() for stem in stems for suffix in CAPTION_SUFFIXES)
        files = (self.files.get((image.parent, name)) for name in names)
        file = next((f for f in files if f is not None), None)
        text = "" if file is None else read_text(file, error=ImageFolderError).strip()
        _checked(text, str(file))
        return Prompt(text, {"prompt": text})


def _checked(text: str, place: str) -> str:
    """Return a caption, or raise ImageFolderError if no tokenizer accepts it."""
    if why := unusable(text):
        raise ImageFolderError(f"{place}: the caption is not usable: {why}")
    return text


def _of_geneval(path: Path, entries: dict[Path, dict[str, Any]]) -> Prompt | None:
    entry = entries.get(path.parents[1]) if path.parent.name == "samples" else None
    return None if entry is None else Prompt(str(entry["prompt"]), entry)


def _geneval(file: Path) -> dict[str, Any] | None:
    """Return the prompt entry of a file in GenEval's folder layout, or None."""
    if not (file.parent.name.isdigit() or (file.parent / "samples").is_dir()):
        return None
    try:
        entry = parse_json(read_text(file), str(file))
    except UserError:
        return None
    is_prompt = isinstance(entry, dict) and "prompt" in entry and "file_name" not in entry
    return entry if is_prompt else None


def _captioned(table: Path) -> Iterator[CaptionedImage]:
    """Yield the images that a table names.

    Raises:
        ImageFolderError: a row is not readable, names no file, or names a file outside the folder.
    """
    rows = [row for row in read_rows(table, error=ImageFolderError) if row is not None]
    if not rows:
        raise ImageFolderError(f"{table} names no image. Add a row for each, or remove the table")
    for row in rows:
        if row.problem == "is no object":
            raise ImageFolderError(f"{row.at} must be an object with file_name and prompt")
        if row.problem:
            raise ImageFolderError(f"{row.at} {row.problem}")
    entries = [{_column(k): v for k, v in row.columns.items()} for row in rows]
    keys = [_text_key(entry) for entry in entries]
    if not any(keys):
        columns = ", ".join(map(str, rows[0].columns))
        say_once(table, f"no row has a {' or '.join(TEXT_KEYS)}; its columns are {columns}")
    for row, entry, key in zip(rows, entries, keys, strict=True):
        # removed from the metadata, because the key means a caption here and may mean something else to a reward
        value = entry.pop(key, None) if key is not None else None
        if isinstance(value, list | dict | bytes):
            raise ImageFolderError(f"{row.at}: {key} must be a text, not {type(value).__name__}")
        caption = _checked("" if value is None else str(value), row.at)
        yield CaptionedImage(
            _inside(row, entry.get("file_name")), Prompt(caption, {**entry, "prompt": caption})
        )


def _text_key(entry: Mapping[str, Any]) -> str | None:
    """Return the first key of a caption that a row has a value for."""
    return next((k for k in TEXT_KEYS if entry.get(k) and str(entry[k]).strip()), None)


def _column(name: Any) -> Any:
    """Return a column's name; the names that this module reads are put into lower case."""
    plain = str(name).strip().lower()
    return plain if plain in ("file_name", *TEXT_KEYS) else name


def _inside(row: Row, name: Any) -> Path:
    """Return the file that a row names, within the folder of its table."""
    if not name:
        raise ImageFolderError(
            f"{row.at} has no file_name; its columns are {', '.join(map(str, row.columns))}. Add one that names "
            "the image"
        )
    inside = os.path.normpath(str(name))
    if os.path.isabs(inside) or Path(inside).parts[0] == "..":
        raise ImageFolderError(
            f"{row.at}: {name} is not inside the folder. Name it relative to the table"
        )
    return row.folder / inside


class _Limits:
    """Pillow's limits, raised only while an image of the user is read."""

    def __init__(self) -> None:
        self.lock, self.readers = threading.Lock(), 0
        self.before: tuple[int | None, int, int] = (None, 0, 0)

    @contextmanager
    def raised(self) -> Iterator[None]:
        with self.lock:
            if self.readers == 0:
                self.before = self._set(MAX_PIXELS, MAX_PNG_TEXT, 4 * MAX_PNG_TEXT)
            self.readers += 1
        try:
            yield
        finally:
            with self.lock:
                self.readers -= 1
                if self.readers == 0:
                    self._set(*self.before)

    @staticmethod
    def _set(pixels: int | None, chunk: int, memory: int) -> tuple[int | None, int, int]:
        png = PngImagePlugin
        before = (Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY)
        Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY = pixels, chunk, memory
        return before


_limits = _Limits()


def read_image(path: Path | bytes) -> Tensor:
    """Return the pixels (3, H, W) uint8 of an image file or of its content.

    The image is turned as its EXIF says. Transparent pixels are composed on white, deeper values scaled to 8 bits by
    their range, and of an animation the first frame is read.

    Raises:
        OSError: the file is missing, empty, truncated or no image.
    """
    try:
        with (
            _limits.raised(),
            Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as file,
        ):
            file.load()
            image = _upright(file)
        if image.mode.startswith("I") or image.mode == "F":
            return _deep(
                np.asarray(image), sixteen_bits="16" in image.mode or file.format != "TIFF"
            )
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError:
        raise
    # Pillow's plugins raise errors of any class on a damaged file
    except Exception as error:
        name = "image" if isinstance(path, bytes) else path
        raise OSError(f"{name}: {type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF says; ignore a damaged EXIF."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image.copy()


def _deep(values: np.ndarray, *, sixteen_bits: bool) -> Tensor:
    """Convert (H, W) integers or floats to grey (3, H, W) uint8.

    The range 0..1, 0..255 or 0..65535 is that of the values, unless integers are known to have 16 bits.
    """
    is_float = np.issubdtype(values.dtype, np.floating)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite")
    # resampled floats overshoot their range
    largest = values.max() / (1.1 if is_float else 1)
    tops = (1, 255, 65535) if is_float or not sixteen_bits else (65535,)
    top = next((top for top in tops if largest <= top), None)
    if top is None:
        raise ValueError(f"pixels up to {values.max()}, which is above 65535")
    grey = values.clip(0, top) * (255 / top)
    pixels = torch.from_numpy(grey.round().astype(np.uint8))
    return pixels.expand(3, *pixels.shape).contiguous()


def fit(
    pixels: Tensor, height: int, width: int, *, place: tuple[float, float] = (0.5, 0.5)
) -> tuple[Tensor, tuple[int, int]]:
    """Resize an image as little as possible, and crop it to `height` x `width`.

    An image of that size stays unchanged.

    Args:
        pixels: (3, H, W) uint8.
        place: position of the crop, 0..1 from the top and 0..1 from the left.

    Returns:
        The crop (3, height, width) uint8, and its top and left in the resized image.
    """
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
    """Yield batches of up to `size` readable images of one resolution.

    A batch is (rows, (B, 3, H, W) pixels, None), or ([row], None, reason) for an image that cannot be read. At most
    `MAX_WAITING` values and one image wait for others of their resolution.
    """
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
