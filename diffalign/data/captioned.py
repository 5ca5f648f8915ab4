"""Stream of captioned images of one size, read from a folder or rendered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.core.seeds import GEOMETRY, stream
from diffalign.data.images import CaptionedImage, fit, read_folder, read_image, require_captions

RENDERED = "shapes:train"


@dataclass(frozen=True)
class CaptionedItem:
    """Image and caption of one row of a source.

    Attributes:
        row: number of the row.
        prompt: caption of the image.
        pixels: (3, H, W) uint8, or None for an image that cannot be used.
        problem: reason why the image cannot be used.
    """

    row: int
    prompt: str
    pixels: Tensor | None
    problem: str = ""


def training_images(source: str) -> list[CaptionedImage]:
    """Return the images of a folder with their captions, which training needs.

    Raises:
        ImageFolderError: the folder does not exist, or holds no image or no caption.
    """
    images = read_folder(source, setting="latents.images")
    require_captions(images, source, why="it is to be trained on")
    return images


@dataclass(frozen=True)
class ImageSource:
    """Source of captioned images, and the settings that crop and flip them.

    The settings are those of `config.LatentsConfig`.

    Raises:
        ImageFolderError: the folder does not exist, or holds no image or no caption.
        UsageError: the source is empty, or rendered images have no limit.
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
            # read now for its errors, and kept for the passes over the images
            _ = self._images

    @cached_property
    def _images(self) -> list[CaptionedImage]:
        return training_images(self.source)

    @property
    def files(self) -> dict[str, list[Any]]:
        """Size in bytes and caption of every image of a folder, by name.

        A cache of the images depends on these values.
        """
        if self.source == RENDERED:
            return {}
        root = Path(self.source)
        return {
            image.path.relative_to(root).as_posix(): [_size(image.path), image.prompt.text]
            for image in self._images
        }

    def items(self, start: int = 0) -> Iterator[CaptionedItem]:
        """Yield items, beginning with row `start` of the source."""
        if self.source == RENDERED:
            assert self.limit is not None
            yield from (self._rendered(row) for row in range(start, self.limit))
            return
        for row, image in enumerate(self._images):
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
    """Stack the pixels of the items that have any: (B, 3, H, W) uint8."""
    return torch.stack([i.pixels for i in items if i.pixels is not None])
