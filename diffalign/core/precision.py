"""How forwards are computed on a device: autocast, and on CPUs plain attention, whose backward is far faster there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def attention(device: torch.device | str) -> Iterator[None]:
    """The attention kernel alone: a backward that recomputes (gradient checkpointing) must find the same one."""
    plain = torch.device(device).type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        yield


@contextmanager
def compute(device: torch.device | str, mixed_precision: str = "bf16") -> Iterator[None]:
    """Context of every forward; `mixed_precision` is "bf16" or "no"."""
    cast = mixed_precision == "bf16"
    kind = torch.device(device).type
    with attention(device), torch.autocast(kind, torch.bfloat16) if cast else nullcontext():
        yield
