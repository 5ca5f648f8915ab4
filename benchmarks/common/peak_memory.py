"""How much memory a forward or a step needs at its peak, counted on any device, the meta device too: the bytes of all
storages that are alive at once, beside those that were there before. Allocators round up, kernels have scratch space.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(
    call: Callable[[], Any], known: Iterable[nn.Module | Tensor], *, backward: bool = False
) -> int:
    """Of what a call allocates; `known`: modules and tensors that it gets. `backward`: the call makes gradients, which
    count; on a device where kernels run."""
    tensors: list[Tensor] = []
    for item in known:
        tensors += [*item.parameters(), *item.buffers()] if isinstance(item, nn.Module) else [item]
    fused = nullcontext() if backward else _Fused()
    with torch.set_grad_enabled(backward), fused, _Storages(tensors) as storages:
        call()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Counts the storages that operations make."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._note(tensor, size=0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf, size=leaf.untyped_storage().nbytes())
        return found

    def _note(self, tensor: Tensor, *, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone(_: Any) -> None:
            del self.seen[key]
            self.alive -= size

        self.seen[key] = weakref.ref(storage, gone)


class _Fused(TorchFunctionMode):
    """On the meta device attention is taken apart, and its matrix would count; fused kernels never write it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, _, value = (
                args[i] if i < len(args) else options[name]
                for i, name in enumerate(("query", "key", "value"))
            )
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **options)
