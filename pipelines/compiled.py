"""Regional torch.compile of a denoiser with static shapes: a batch of another size is no other compilation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
POSITIONS = ("img_ids", "txt_ids")
VARIANTS = 64
"""Compilations of one block class at most."""


def compile_blocks(denoiser: nn.Module, sizes: Mapping[bool, Iterable[int]]) -> bool:
    """Compile every block of the denoiser's lists by itself; blocks that are alike share one compilation. Adapters may
    be attached, switched and merged afterwards.

    `sizes`: rows of the batches that are worth a compilation, with gradient (True) and without. A smaller batch (the
    last of an evaluation, an update without its uninformative groups) is filled up to the next of them.

    Returns False, with a warning, on a machine that cannot compile: the denoiser then works as before.
    """
    problem = _why_not(denoiser)
    if problem is not None:
        logger.warning("model.compile: going on without, slower: %s", problem)
        return False
    # blocks that differ (the last of SD3 has no context) and every policy and mode are variants of one function; beyond
    # the limit torch falls back to eager
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
    for block in blocks(denoiser):
        block.compile(dynamic=False)
    _PaddedBatches(denoiser, sizes)
    return True


def compiling_seconds() -> float:
    """Return the seconds that this process has spent compiling."""
    spent: dict[str, float] = torch._dynamo.utils.calculate_time_spent()
    return spent.get("total_wall_time", spent.get("entire_frame_compile", 0.0))


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer, or those of a U-Net's two sides: the entries of its lists."""
    return [b for part in denoiser.children() if isinstance(part, nn.ModuleList) for b in part]


def _why_not(denoiser: nn.Module) -> str | None:
    """The reason why nothing can be compiled here: no blocks, or a trivial function fails."""
    if not blocks(denoiser):
        return "the denoiser has no list of blocks"
    try:
        device = next(denoiser.parameters()).device
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever is missing: compiler, headers, triton
        text = str(error).strip() or type(error).__name__
        return f"torch.compile fails here: {text.splitlines()[0]}"
    return None


class _PaddedBatches:
    """Hooks that fill a batch up to the next size with its first row, and cut the output: rows do not know each other.

    Depends on the batch alone, not on those before it, so that a resumed run computes the same.
    """

    def __init__(self, denoiser: nn.Module, sizes: Mapping[bool, Iterable[int]]) -> None:
        self._sizes = {grad: sorted(rows) for grad, rows in sizes.items()}
        denoiser.register_forward_pre_hook(self._pad, with_kwargs=True)
        denoiser.register_forward_hook(self._cut, with_kwargs=True)
        self._rows: int | None = None
        """Of a call whose batch was filled up."""

    def _pad(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = batch_rows(args, kwargs)
        sizes = self._sizes[torch.is_grad_enabled()]  # each mode is a compilation of its own
        size = next((s for s in sizes if s >= rows), rows)
        self._rows = None if size == rows else rows
        if size == rows:
            return args, kwargs
        filled = {name: _fill(name, v, rows, size) for name, v in kwargs.items()}
        return tuple(_fill("", v, rows, size) for v in args), filled

    def _cut(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._rows is None:
            return output
        if not isinstance(output, tuple):
            raise TypeError("a compiled denoiser is called with return_dict=False")
        return tuple(o[: self._rows] for o in output)


def batch_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of a call of a diffusers denoiser."""
    return len(args[0] if args else kwargs["hidden_states"])


def _fill(name: str, value: Any, rows: int, size: int) -> Any:
    """`value` with `size` rows, if it has a batch dimension; position ids have none. Further conditions of U-Nets
    are in a mapping."""
    if isinstance(value, dict):
        return {key: _fill(key, part, rows, size) for key, part in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0 or name in POSITIONS:
        return value
    if len(value) != rows:
        return value
    return torch.cat([value, value[:1].expand(size - rows, *value.shape[1:])])
