"""Attention backends of diffusers, for every family.

The processors of SD3, SANA and U-Nets call torch's kernel themselves. A copy of each is put in its place, whose calls
of that kernel go through diffusers' dispatcher. The copy runs the stock processor's own code, so that it computes what
the stock processor computes. diffusers' process-wide backend stays as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from diffalign.acceleration.parts import Inapplicable
from diffalign.acceleration.undo import Undo
from diffalign.core.errors import first_line

BACKEND = "_attention_backend"
"""Attribute of a processor that diffusers' dispatcher reads."""
EVERYWHERE = ("native", "_native_math", "_native_flash", "flex")
"""Backends with a kernel for the CPU."""
OTHER_DEVICES = ("_native_npu", "_native_xla")
"""Backends of devices other than CUDA."""
ANY_PRECISION = (*EVERYWHERE, "_native_efficient", "xformers", *OTHER_DEVICES)
"""Backends that compute in float32 too."""
INSTALLATION = {
    "_flash_3": "build FlashAttention 3 from source, or take `_flash_3_hub` after `pip install kernels`",
    "sage": "install SageAttention 2 from source (PyPI has version 1), or take `sage_hub` after `pip install kernels`",
    "hub": "`pip install kernels`",
    "flash": "`pip install flash-attn`",
    "xformers": "`pip install xformers`",
    "npu": "`pip install torch_npu`",
    "xla": "`pip install torch_xla`",
}
"""Remedies for a backend that the machine lacks, by part of its name.

The first part that fits counts.
"""


class _Rerouting(TorchFunctionMode):
    """Block in which torch's attention kernel is diffusers' dispatcher. It holds for its own thread only."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _dispatch(self._backend, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dispatch(
    backend: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any
) -> Tensor:
    """Return torch's attention of (B, heads, N, D), computed by a backend of diffusers."""
    # the dispatcher has heads after tokens
    rows = (part.transpose(1, 2) for part in (query, key, value))
    output: Tensor = attention_dispatch.dispatch_attention_fn(
        *rows, attn_mask=attn_mask, backend=backend, **kwargs
    )
    return output.transpose(1, 2)


@functools.cache
def _rerouted(kind: Any) -> type:
    """Return a processor's class whose calls of torch's kernel go to the dispatcher."""
    stock: Callable[..., Any] = kind.__call__

    # diffusers reads the signature to know which arguments a processor takes
    @functools.wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Rerouting(getattr(self, BACKEND)):
            return stock(self, *args, **kwargs)

    return type(f"Dispatched{kind.__name__}", (kind,), {"__call__": call})


def is_dispatched(processor: Any) -> bool:
    """Return whether a processor calls diffusers' dispatcher by itself."""
    return hasattr(processor, BACKEND)


def calls_kernel(processor: Any) -> bool:
    """Return whether a processor calls torch's attention kernel by itself."""
    code = getattr(getattr(processor, "__call__", None), "__code__", None)  # noqa: B004
    return code is not None and scaled_dot_product_attention.__name__ in code.co_names


def parts_of(denoiser: nn.Module) -> list[Any]:
    """Return the parts of a denoiser whose attention a backend can compute.

    Linear attention and processors that multiply the matrices themselves are left out.
    """
    parts = [p for p in denoiser.modules() if getattr(p, "processor", None) is not None]
    return [p for p in parts if is_dispatched(p.processor) or calls_kernel(p.processor)]


def through_dispatcher(processor: Any, backend: str) -> Any:
    """Return a copy of a processor that computes attention with a backend of diffusers."""
    twin = copy.copy(processor)
    if not is_dispatched(processor):
        # mypy does not see that classes have hashes
        twin.__class__ = _rerouted(cast(Hashable, type(processor)))
    setattr(twin, BACKEND, attention_dispatch.AttentionBackendName(backend))
    return twin


def set_attention(
    denoiser: Any, backend: str, undo: Undo, *, probe: Callable[[], object] | None = None
) -> None:
    """Set the attention backend of a denoiser, and of nothing else.

    Args:
        denoiser: transformer or U-Net of diffusers.
        backend: backend's name in diffusers.
        undo: gets the step that puts the exact processors back.
        probe: call that draws with the backend.

    Raises:
        Inapplicable: the machine lacks the backend, or the probe fails with it.
    """
    _check(denoiser, backend)
    pairs = [(p, p.processor, through_dispatcher(p.processor, backend)) for p in parts_of(denoiser)]

    def put_back() -> None:
        for part, stock, twin in pairs:
            # a processor that something else put there is not ours to remove
            if part.processor is twin:
                part.processor = stock

    undo.add(put_back)
    for part, _, twin in pairs:
        part.processor = twin
    if probe is None:
        return
    try:
        probe()
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        why = f"this backend fails with the model's masks, head size or precision ({first_line(error)})"
        raise Inapplicable(
            "attention", backend, why, "Choose another backend, or leave the option out"
        ) from error


def _check(denoiser: Any, backend: str) -> None:
    """Raise Inapplicable if the machine or the denoiser's place and precision exclude a backend."""
    names = [b.value for b in attention_dispatch.AttentionBackendName]
    if backend not in names:
        why = "diffusers has no such attention backend"
        raise Inapplicable("attention", backend, why, f"Choose from {', '.join(names)}")
    name = attention_dispatch.AttentionBackendName(backend)
    try:
        attention_dispatch._check_attention_backend_requirements(name)
    except (RuntimeError, ImportError, ValueError) as error:
        what = next((text for part, text in INSTALLATION.items() if part in backend), "")
        remedy = f"To use it: {what}" if what else "Leave the option out"
        raise Inapplicable("attention", backend, "this machine lacks it", remedy) from error
    device = denoiser.device.type
    if device != "cuda" and backend not in (*EVERYWHERE, *OTHER_DEVICES):
        why = f"the backend has kernels for CUDA only, and the denoiser is on {device}"
        remedy = f"Move the pipeline to CUDA, or choose from {', '.join(EVERYWHERE)}"
        raise Inapplicable("attention", backend, why, remedy)
    if device == "cuda" and denoiser.dtype == torch.float32 and needs_half(backend):
        why = "the backend computes in 16 bits, and the denoiser is float32"
        raise Inapplicable("attention", backend, why, "Load the pipeline in bfloat16")
    try:
        attention_dispatch._maybe_download_kernel_for_backend(name)
    except Exception as error:
        # the hub, its kernels and their builds raise errors of many kinds
        why = f"its kernel cannot be loaded from the hub ({first_line(error)})"
        remedy = "Check the network, or choose a backend that is installed"
        raise Inapplicable("attention", backend, why, remedy) from error


def needs_half(backend: str) -> bool:
    """Return whether a CUDA backend computes in 16 bits only."""
    return backend not in ANY_PRECISION or backend == "_native_flash"


def is_lossy(backend: object) -> bool:
    """Return whether a backend rounds queries and keys to fewer bits than the model has."""
    return "sage" in str(backend)


@dataclass(frozen=True)
class Pick:
    """Backend of `attention="auto"`, and why. The backend is None if torch's own choice stays.

    Attributes:
        backend: backend's name in diffusers, or None.
        why: reason of the choice.
        remedy: what would make another choice possible.
    """

    backend: str | None
    why: str
    remedy: str = "name a backend to use it anyway"


def pick(denoiser: Any) -> Pick:
    """Return the backend for a denoiser on this machine. Nothing is downloaded."""
    device, dtype = denoiser.device, denoiser.dtype
    if device.type != "cuda":
        return Pick(None, f"on {device.type} torch chooses its fastest attention kernel by itself")
    if dtype not in (torch.float16, torch.bfloat16):
        why = f"kernels faster than torch's own compute in 16 bits, and the denoiser is {dtype}"
        return Pick(None, why, "load the pipeline in bfloat16")
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        why = "torch chooses among its flash, cuDNN and memory-efficient kernels by itself"
        return Pick(None, why)
    if attention_dispatch._CAN_USE_FLASH_ATTN_3:
        return Pick("_flash_3", "FlashAttention 3 is installed and made for this device")
    why = "FlashAttention 3 is made for this device, and is not installed"
    return Pick(None, why, INSTALLATION["_flash_3"])
