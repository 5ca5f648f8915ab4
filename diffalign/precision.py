"""How forwards are computed on a device: autocast, and on CPUs plain attention, whose backward is far faster there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def compute(device: torch.device | str, mixed_precision: str = "bf16") -> Iterator[None]:
    """Context of every forward; `mixed_precision` is "bf16", "fp16" or "no"."""
    kind = torch.device(device).type
    plain = sdpa_kernel(SDPBackend.MATH) if kind == "cpu" else nullcontext()
    dtype = DTYPES.get(mixed_precision)
    cast = torch.autocast(kind, dtype) if dtype is not None else nullcontext()
    with plain, cast:
        yield
