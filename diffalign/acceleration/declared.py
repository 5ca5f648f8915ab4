"""Watch over the numbers of images that an acceleration is compiled for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from diffalign.acceleration.cache import INPUTS
from diffalign.acceleration.guidance import guides
from diffalign.acceleration.tap import Inner, Request

logger = logging.getLogger(__name__)


class Declared:
    """Handler that warns about numbers of images that no block is compiled for.

    Blocks are compiled with static shapes, so that such a call compiles them again; its images are right. Numbers that
    are seen before `close` are compiled already.
    """

    def __init__(self, pipeline: Any, batch_sizes: Sequence[int]) -> None:
        self._pipeline = pipeline
        self.batch_sizes = tuple(batch_sizes)
        self.seen: set[int] = set()
        """Numbers of images that came so far."""
        self._is_open = True

    def close(self) -> None:
        """Warn from now on."""
        self._is_open = False

    def begin(self, request: Request) -> None:
        """Do nothing."""

    def end_step(self, step: int) -> None:
        """Do nothing."""

    def forward(
        self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, int]
    ) -> Any:
        rows = len(args[0] if args else next(kwargs[n] for n in INPUTS if n in kwargs))
        images = rows // 2 if guides(self._pipeline) else rows
        if images not in self.seen:
            self.seen.add(images)
            if not self._is_open and images not in self.batch_sizes:
                logger.warning(
                    "compile: this call draws %d images at a time, and the blocks are compiled for %s; they are "
                    "compiled again. Pass all numbers of images to `accelerate` as `batch_sizes`.",
                    images,
                    ", ".join(map(str, self.batch_sizes)),
                )
        return inner(*args, **kwargs)
