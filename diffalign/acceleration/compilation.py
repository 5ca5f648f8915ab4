"""Compilation of a denoiser's blocks for the shapes that were declared.

Blocks are compiled with static shapes, once for each declared size and number of images. A call of another shape does
not compile: its blocks run as they are, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffalign.acceleration.declared import Declared
from diffalign.acceleration.parts import denoiser_of
from diffalign.acceleration.tap import IMPLEMENTATION
from diffalign.acceleration.undo import Undo


def compile_parts(pipeline: Any, declared: Declared, undo: Undo) -> str:
    """Compile the blocks of a denoiser when they are first called.

    Args:
        pipeline: pipeline of diffusers.
        declared: shapes that are compiled.
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
    for part in parts:
        setattr(part, IMPLEMENTATION, _Switch(part, declared))
    declared.watch(pipeline, denoiser, undo)
    pixels = ", ".join(f"{height} x {width}" for height, width in declared.sizes)
    return f"{len(parts)} blocks, for {pixels} pixels"


class _Switch:
    """Call of a compiled block; undeclared shapes run the block as it is."""

    def __init__(self, part: nn.Module, declared: Declared) -> None:
        self._declared, self._plain = declared, part._call_impl
        self._compiled: Callable[..., Any] = getattr(part, IMPLEMENTATION)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if self._declared.holds else self._plain)(*args, **kwargs)
