"""Count the peak memory of a forward or a training step.

It works on any device, the meta device included. The count is the bytes of all storages that are alive at once,
without those that existed before the call. Real peaks are higher: allocators round up, and kernels use scratch space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffalign.training.peak import LiveBytes


def peak_bytes(
    call: Callable[[], Any], allocated: Iterable[nn.Module | Tensor], *, backward: bool = False
) -> int:
    """Return the bytes that a call allocates at its peak.

    Args:
        call: the forward or step to measure.
        allocated: modules and tensors that exist before the call and are not counted.
        backward: whether the call computes gradients, which are counted. It needs a device with kernels.
    """
    tensors: list[Tensor] = []
    for item in allocated:
        tensors += [*item.parameters(), *item.buffers()] if isinstance(item, nn.Module) else [item]
    fused = nullcontext() if backward else _Fused()
    with torch.set_grad_enabled(backward), fused, LiveBytes(tensors) as mode:
        call()
    peak: int = mode.peak
    return peak


class _Fused(TorchFunctionMode):
    """Replacement of attention by its output shape.

    On the meta device attention is decomposed, and its matrix would be counted; fused kernels never allocate it.
    """

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
