"""Captioned images of one size, one after the other: of a folder, or rendered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.core.seeds import GEOMETRY, stream
from diffalign.data.images import fit, read_folder, read_image, require_captions

RENDERED = "shapes:train"


@dataclass(frozen=True)
class CaptionedItem:
    """Image of a `row`: `pixels` (3, H, W) uint8 and a caption, or the `problem`."""

    row: int
    prompt: str
    pixels: Tensor | None
    problem: str = ""


@dataclass(frozen=True)
class ImageSource:
    """Source of images and how they are cut, as in `config.LatentsConfig`.

    Raises:
        ImageFolderError: there is no such folder, no image in it, or no caption.
        UsageError: nothing is said, or how many to render is not.
    """

    source: str
    size: tuple[int, int]
    seed: int = 0
    center_crop: bool = True
    random_flip: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("latents.images: name a folder of captioned images, or shapes:train")
        if self.source == RENDERED and self.limit is None:
            raise UsageError(f"latents.limit: say how many images of {RENDERED} to render")
        if self.source != RENDERED:
            images = read_folder(self.source, flag="latents.images")
            require_captions(images, self.source, why="it is to be trained on")

    @property
    def files(self) -> dict[str, list[Any]]:
        """Name to size in bytes and caption of every image of a folder: what a cache depends on."""
        if self.source == RENDERED:
            return {}
        root = Path(self.source)
        return {
            image.path.relative_to(root).as_posix(): [_size(image.path), image.prompt.text]
            for image in read_folder(root, flag="latents.images")
        }

    def items(self, start: int = 0) -> Iterator[CaptionedItem]:
        """Images from a row of the source on."""
        if self.source == RENDERED:
            assert self.limit is not None
            yield from (self._rendered(row) for row in range(start, self.limit))
            return
        for row, image in enumerate(read_folder(self.source, flag="latents.images")):
            if row < start:
                continue
            try:
                pixels = read_image(image.path)
            except OSError:
                yield CaptionedItem(row, image.prompt.text, None, "unreadable")
                continue
            if not image.prompt.text.strip():
                yield CaptionedItem(row, "", None, "no caption")
                continue
            yield CaptionedItem(row, image.prompt.text, self._cut(pixels, row))

    def _cut(self, pixels: Tensor, row: int) -> Tensor:
        rng = np.random.default_rng(stream(GEOMETRY, self.seed, row))
        top, left = (0.5, 0.5) if self.center_crop else rng.uniform(size=2)
        image, _ = fit(pixels, *self.size, place=(top, left))
        return image.flip(-1) if self.random_flip and rng.uniform() < 0.5 else image

    def _rendered(self, row: int) -> CaptionedItem:
        from diffalign.shapes.prompts import sample_prompts
        from diffalign.shapes.world import render, sample_scene

        rng = np.random.default_rng(stream(GEOMETRY, self.seed, row))
        entry = sample_prompts(rng, 1)[0]
        pixels = torch.from_numpy(render(sample_scene(entry, rng))).permute(2, 0, 1)
        return CaptionedItem(row, entry["prompt"], fit(pixels, *self.size)[0])


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def stacked(items: Sequence[CaptionedItem]) -> Tensor:
    """(B, 3, H, W) uint8 of items that have pixels."""
    return torch.stack([i.pixels for i in items if i.pixels is not None])
