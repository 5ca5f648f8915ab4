"""Compilation of a denoiser's blocks for the sizes that were declared.

Blocks are compiled with static shapes, once for each declared size. A call of another size does not compile: its blocks
run as they are, and a warning says so.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from diffalign.acceleration.parts import denoiser_of
from diffalign.acceleration.tap import IMPLEMENTATION
from diffalign.acceleration.undo import Undo, replace_method

logger = logging.getLogger(__name__)
TEXT = "encoder_hidden_states"
"""Argument of a denoiser that holds the text, (B, tokens, width)."""
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
"""Arguments of a denoiser that hold a mask of the text, (B, tokens)."""
Size = tuple[int, int]


def compile_parts(pipeline: Any, sizes: Sequence[Size], undo: Undo) -> str:
    """Compile the blocks of a denoiser when they are first called.

    Args:
        pipeline: pipeline of diffusers.
        sizes: sizes (height, width) in pixels that are compiled.
        undo: gets the steps that bring the blocks back.

    Returns:
        What is compiled, in words.
    """
    from diffalign.pipelines.compiled import blocks, compile_each

    denoiser = denoiser_of(pipeline)
    middle: nn.Module | None = getattr(denoiser, "mid_block", None)
    listed = [*blocks(denoiser), *([] if middle is None else [middle])]
    parts = [part for part in listed if part._compiled_call_impl is None]
    limit = torch._dynamo.config.recompile_limit

    def put_back() -> None:
        for part in parts:
            vars(part).pop(IMPLEMENTATION, None)
        torch._dynamo.config.recompile_limit = limit

    undo.add(put_back)
    compile_each(parts)
    watch = _Watch(sizes)
    for part in parts:
        setattr(part, IMPLEMENTATION, _Switch(part, watch))
    undo.add(denoiser.register_forward_pre_hook(watch.read_text, with_kwargs=True).remove)
    _read_sizes(pipeline, watch, undo)
    pixels = ", ".join(f"{height} x {width}" for height, width in sizes)
    return f"{len(parts)} blocks, for {pixels} pixels"


class _Switch:
    """Call of a compiled block; undeclared shapes run the block as it is."""

    def __init__(self, part: nn.Module, watch: _Watch) -> None:
        self._watch, self._plain = watch, part._call_impl
        self._compiled: Callable[..., Any] = getattr(part, IMPLEMENTATION)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if self._watch.declared else self._plain)(*args, **kwargs)


class _Watch:
    """Comparison of each call's size and text with those that are compiled."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self._sizes = {(int(height), int(width)) for height, width in sizes}
        self._has_size, self._has_text = True, True
        self._tokens: int | None = None
        self._told: set[object] = set()

    @property
    def declared(self) -> bool:
        """True if the current call has shapes that are compiled."""
        return self._has_size and self._has_text

    def read_size(self, size: Size) -> None:
        """Take note of the size (height, width) of a call."""
        self._has_size = size in self._sizes
        if not self._has_size:
            height, width = size
            self._tell(size, f"{height} x {width} pixels are none of the declared sizes", "sizes")

    def read_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pad a masked text to the compiled tokens, or take note of another length."""
        text = kwargs.get(TEXT)
        if not isinstance(text, torch.Tensor) or not self._has_size:
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
            self._tell(tokens, reason, "arguments")
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


def _read_sizes(pipeline: Any, watch: _Watch, undo: Undo) -> None:
    """Let a watch see the size of every call of a pipeline."""
    prepare = getattr(pipeline, "prepare_latents", None)
    parameters = inspect.signature(prepare).parameters if prepare is not None else {}
    if prepare is None or not {"height", "width"} <= set(parameters):
        return

    @functools.wraps(prepare)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        values = inspect.signature(prepare).bind(*args, **kwargs).arguments
        watch.read_size((int(values["height"]), int(values["width"])))
        return prepare(*args, **kwargs)

    replace_method(pipeline, "prepare_latents", prepare_latents, undo)
