"""Contexts that forwards run in: autocast and the choice of the attention kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def attention(device: torch.device | str) -> Iterator[None]:
    """Select the attention kernel of a device.

    A backward that recomputes activations (gradient checkpointing) must run in the same context as its forward.
    """
    # the backward of plain attention is far faster on CPUs
    plain = torch.device(device).type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        yield


@contextmanager
def compute(device: torch.device | str, mixed_precision: str = "bf16") -> Iterator[None]:
    """Run forwards of a device in this context.

    Args:
        mixed_precision: "bf16" (autocast) or "no".
    """
    cast = mixed_precision == "bf16"
    kind = torch.device(device).type
    with attention(device), torch.autocast(kind, torch.bfloat16) if cast else nullcontext():
        yield
