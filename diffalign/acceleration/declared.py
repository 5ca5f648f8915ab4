"""Shapes that an acceleration's blocks are compiled for, and comparison of each call with them."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from diffalign.acceleration.undo import Undo, replace_method

logger = logging.getLogger(__name__)
TEXT = "encoder_hidden_states"
"""Argument of a denoiser that holds the text, (B, tokens, width)."""
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
"""Arguments of a denoiser that hold a mask of the text, (B, tokens)."""
SHAPE = ("batch_size", "height", "width")
"""Arguments of a pipeline's `prepare_latents` that decide on the shape of its latents."""
Size = tuple[int, int]


class Declared:
    """Sizes, numbers of images and tokens that are compiled.

    Blocks of a call with any other shape run uncompiled, and a warning says so once. Numbers of images that come before
    `close`, those of the check, are compiled, too.
    """

    def __init__(self, sizes: Sequence[Size], batch_sizes: Sequence[int]) -> None:
        self.sizes = tuple((int(height), int(width)) for height, width in sizes)
        self.batch_sizes = tuple(int(n) for n in batch_sizes)
        self._is_open = True
        self._checked: set[tuple[Size, int]] = set()
        self._has_latents, self._has_text = True, True
        self._tokens: int | None = None
        self._told: set[object] = set()

    @property
    def holds(self) -> bool:
        """True if the current call has shapes that are compiled."""
        return self._has_latents and self._has_text

    def close(self) -> None:
        """Take no further numbers of images."""
        self._is_open = False

    def watch(self, pipeline: Any, denoiser: nn.Module, undo: Undo) -> None:
        """Compare every call of a pipeline from now on."""
        undo.add(denoiser.register_forward_pre_hook(self._read_text, with_kwargs=True).remove)
        prepare = getattr(pipeline, "prepare_latents", None)
        if prepare is None or not set(SHAPE) <= set(inspect.signature(prepare).parameters):
            return

        @functools.wraps(prepare)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            values = inspect.signature(prepare).bind(*args, **kwargs).arguments
            images, height, width = (int(values[name]) for name in SHAPE)
            self._read_latents((height, width), images)
            return prepare(*args, **kwargs)

        replace_method(pipeline, "prepare_latents", prepare_latents, undo)

    def _read_latents(self, size: Size, images: int) -> None:
        """Take note of the size (height, width) and the number of images of a call."""
        if self._is_open and size in self.sizes:
            self._checked.add((size, images))
        has_size = size in self.sizes
        has_number = images in self.batch_sizes or (size, images) in self._checked
        self._has_latents = has_size and has_number
        if not has_size:
            height, width = size
            self._tell(size, f"{height} x {width} pixels are none of the declared sizes", "sizes")
        elif not has_number:
            numbers = ", ".join(map(str, self.batch_sizes))
            reason = f"{images} images at a time are none of the declared numbers ({numbers})"
            self._tell(images, reason, "batch_sizes")

    def _read_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pad a masked text to the compiled tokens, or take note of another length."""
        text = kwargs.get(TEXT)
        if not isinstance(text, torch.Tensor) or not self._has_latents:
            return None
        tokens = text.shape[1]
        if self._tokens is None:
            self._tokens = tokens
        missing = self._tokens - tokens
        masks = [name for name in MASKS if isinstance(kwargs.get(name), torch.Tensor)]
        self._has_text = missing == 0 or (missing > 0 and bool(masks))
        if missing == 0:
            return None
        if not self._has_text:
            reason = f"a text of {tokens} tokens is none of the {self._tokens} that are compiled"
            self._tell((TEXT, tokens), reason, "arguments")
            return None
        filled = {TEXT: pad(text, (0, 0, 0, missing))}
        # masked tokens add nothing, so that the prediction stays what it is
        filled |= {name: pad(kwargs[name], (0, missing)) for name in masks}
        return args, {**kwargs, **filled}

    def _tell(self, key: object, reason: str, argument: str) -> None:
        if key not in self._told:
            logger.warning(
                "compile: %s; its blocks run uncompiled. Name it in `%s` of `accelerate`.",
                *(reason, argument),
            )
        self._told.add(key)
