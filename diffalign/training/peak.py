"""Count the memory of forwards and backwards, as tensors come and go.

On the meta device nothing is computed, so that a model of any size can be counted. Buffers inside a kernel and the
allocator's rounding are not part of the count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffalign.core.fingerprint import plain_tensors


class LiveBytes(TorchDispatchMode):
    """Mode that counts the bytes of the tensors that operations make, while they live.

    Args:
        held: tensors that exist before, and are not counted.

    Attributes:
        live: bytes of the tensors that live now.
        peak: largest number of bytes that lived at the same time.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known = storages(held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # what is given was there before; a view of it is not new
        self._watch((args, kwargs), counted=False)
        result = func(*args, **(kwargs or {}))
        self._watch(result, counted=True)
        return result

    def _watch(self, values: object, *, counted: bool) -> None:
        for leaf in tree_leaves(values):
            for tensor in plain_tensors(leaf) if isinstance(leaf, Tensor) else ():
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if counted else 0
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    # a view of the same storage keeps its Python object alive
                    weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Return the identities of the memory of tensors, inner tensors of quantised weights included."""
    return {t.untyped_storage()._cdata for outer in tensors for t in plain_tensors(outer)}


def peak_of(module: nn.Module, run: Callable[[], object]) -> int:
    """Return the largest number of bytes that live together in a call.

    The module's own are not counted. Gradients of the module's parameters are not counted either.
    """
    # from the second micro-batch on, gradients are there already
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    with LiveBytes([*module.parameters(), *module.buffers(), *gradients]) as mode:
        run()
    for parameter in parameters:
        parameter.grad = None
    peak: int = mode.peak
    return peak


class AsOnDevice(TorchFunctionMode):
    """Mode in which the meta device makes the tensors that a GPU makes.

    Attention makes the tensors of a fused kernel. The plain kernel, which the meta device uses, makes all
    probabilities. Products of float32 tensors (SANA's linear attention) have the dtype of autocast, which the meta
    device does not support.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.matmul and self._autocast is not None:
            args = tuple(a.to(self._autocast) for a in args)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        tensors = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return _FusedAttention.apply(tensors["query"], tensors["key"], tensors["value"])  # type: ignore[no-untyped-call]


def step_as_on_device(loss_of: Callable[[], Tensor], *, autocast: torch.dtype | None) -> None:
    """Run a forward and its backward on the meta device.

    They make the tensors that a GPU makes.

    Args:
        loss_of: returns the loss, a tensor without dimensions.
        autocast: dtype of autocast; None without.
    """
    with AsOnDevice(autocast):
        loss = loss_of()
        # `Tensor.backward` leaves the mode, in which checkpointed blocks must be computed again
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward(
            (loss,),
            (torch.ones_like(loss),),
            False,
            False,
            (),
            allow_unreachable=True,
            accumulate_grad=True,
        )


class _FusedAttention(torch.autograd.Function):
    """Attention with the tensors of a fused kernel, whose values are not computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        # fused kernels allocate (rows, length, heads, channels) and return it transposed
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        norms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, norms)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
