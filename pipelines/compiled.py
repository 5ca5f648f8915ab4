"""Compilation of a denoiser's blocks with static shapes.

Smaller batches are padded so that they do not trigger a recompilation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core.errors import first_line

logger = logging.getLogger(__name__)
POSITIONS = ("img_ids", "txt_ids")
VARIANTS = 64
"""Largest number of compilations of one block class."""


@dataclass(frozen=True)
class CompiledSizes:
    """Batch sizes of a denoiser's forwards that are worth a compilation."""

    with_gradient: Set[int] = frozenset()
    without: Set[int] = frozenset()

    def __or__(self, other: CompiledSizes) -> CompiledSizes:
        """Return the sizes of both."""
        return CompiledSizes(self.with_gradient | other.with_gradient, self.without | other.without)

    def padded(self, rows: int, *, gradient: bool) -> int:
        """Return the smallest size that holds a batch of `rows`, or `rows` if none does."""
        sizes = self.with_gradient if gradient else self.without
        return min((size for size in sizes if size >= rows), default=rows)


def compile_blocks(denoiser: nn.Module, sizes: CompiledSizes) -> bool:
    """Compile each block in the denoiser's lists; equal blocks share one compilation.

    Adapters may be attached, switched and merged afterwards.

    Args:
        sizes: batch sizes to compile for. A smaller batch, such as the last of an evaluation or an update without its
            uninformative groups, is padded to the next of these sizes.

    Returns:
        False, with a warning, on a machine that cannot compile; the denoiser then works as before.
    """
    problem = _why_not(denoiser)
    if problem is not None:
        logger.warning("model.compile: going on without, slower: %s", problem)
        return False
    compile_each(blocks(denoiser))
    _PaddedBatches(denoiser, sizes)
    return True


def compile_each(parts: Iterable[nn.Module]) -> None:
    """Compile blocks with static shapes; equal blocks share one compilation."""
    # unequal blocks (the last of SD3 has no context), policies and modes are variants of one function, and torch falls
    # back to eager beyond the limit
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
    for part in parts:
        part.compile(dynamic=False)


def compiling_seconds() -> float:
    """Return the seconds that this process has spent compiling."""
    spent: dict[str, float] = torch._dynamo.utils.calculate_time_spent()
    return spent.get("total_wall_time", spent.get("entire_frame_compile", 0.0))


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks in the denoiser's lists: of a transformer, or of a U-Net's two sides."""
    return [b for part in denoiser.children() if isinstance(part, nn.ModuleList) for b in part]


def _why_not(denoiser: nn.Module) -> str | None:
    """Return the reason why compilation is impossible, or None.

    The reasons are a denoiser without lists of blocks, and a trivial function that fails to compile.
    """
    if not blocks(denoiser):
        return "the denoiser has no list of blocks"
    try:
        device = next(denoiser.parameters()).device
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    # a compiler, headers or triton may be missing, and each raises another error
    except Exception as error:
        return f"torch.compile fails here: {first_line(error)}"
    return None


class _PaddedBatches:
    """Hooks that pad a batch with its first row, and cut the output.

    Rows do not influence each other. The padded size depends on this batch only, not on earlier batches, so that a
    resumed run computes the same.
    """

    def __init__(self, denoiser: nn.Module, sizes: CompiledSizes) -> None:
        self._sizes = sizes
        denoiser.register_forward_pre_hook(self._pad, with_kwargs=True)
        denoiser.register_forward_hook(self._cut, with_kwargs=True)
        self._rows: int | None = None
        """Number of rows in the current call before padding; None without padding."""

    def _pad(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = batch_rows(args, kwargs)
        # each mode has its own compilations
        size = self._sizes.padded(rows, gradient=torch.is_grad_enabled())
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
    """Return the batch size of a call of a diffusers denoiser."""
    return len(args[0] if args else kwargs["hidden_states"])


def _fill(name: str, value: Any, rows: int, size: int) -> Any:
    """Pad an argument to `size` rows if it has a batch dimension.

    Position ids have none. Further conditions of U-Nets are in a mapping, which is padded entry by entry. Z-Image has
    lists with one entry per row.
    """
    if isinstance(value, dict):
        return {key: _fill(key, part, rows, size) for key, part in value.items()}
    if isinstance(value, list) and len(value) == rows:
        return value + value[:1] * (size - rows)
    if not isinstance(value, Tensor) or value.ndim == 0 or name in POSITIONS:
        return value
    if len(value) != rows:
        return value
    return torch.cat([value, value[:1].expand(size - rows, *value.shape[1:])])
