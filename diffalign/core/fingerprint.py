"""Fingerprints of weights, files and JSON values.

A fingerprint of weights does not depend on where they were loaded from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core.errors import UsageError

SMALL = 500_000_000
"""Size in bytes below which `of_place` reads a file whole."""
SMALLEST = 2.0**-14
"""Smallest normal number of float16."""
WORDS = 1 << 20
"""Number of 64-bit words that `checksum` sums at a time."""


class UnknownWeights(UsageError):
    """Weights that are not in memory: offloaded to disk, or on the meta device."""


def of_json(value: Any, *, default: Callable[[Any], Any] | None = None) -> str:
    """Return 64 hex digits of a JSON value, independent of the order of keys.

    Args:
        default: converts other values, see `json.dumps`.
    """
    text = json.dumps(value, sort_keys=True, default=default)
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """Return 64 hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_place(name: str | None) -> str | None:
    """Return 16 hex digits that change when a local file or folder changes.

    Return None for names of models and hub ids. Small files count by content, large ones by size and time.
    """
    path = Path(name) if name else None
    if path is None or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        whole = size < SMALL
        digest.update(file.read_bytes() if whole else str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def fingerprint(modules: Mapping[str, nn.Module], *, rounded: bool = False) -> str:
    """Return 16 hex digits of modules: name, shape and first 64 values of each tensor.

    Adapters are left out.

    Args:
        rounded: round floats to bfloat16, and to 0 below float16's normal numbers. Weights that were saved in bfloat16
            then have one fingerprint in every dtype. So have the weights of any file, loaded in bfloat16 or float32.

    Raises:
        UnknownWeights: the values of some weights are not in memory.
    """
    digest = hashlib.sha256()
    for part_name, part in sorted(modules.items()):
        for name, tensor in sorted(part.state_dict().items()):
            if "lora_" not in name and isinstance(tensor, Tensor):
                plain = name.replace(".base_layer", "")
                digest.update(f"{part_name}.{plain} {tuple(tensor.shape)}".encode())
                for inner in plain_tensors(tensor):
                    if inner.is_meta:
                        raise UnknownWeights(f"weights of {part_name} are offloaded ({name})")
                    values = inner.flatten()[:64].float().cpu()
                    digest.update((_coarse(values) if rounded else values).numpy().tobytes())
    return digest.hexdigest()[:16]


def checksum(tensor: Tensor) -> str:
    """Return 16 hex digits of every bit of a tensor, computed where the tensor lies.

    It is a sum of 64-bit words times odd pseudo-random numbers, modulo 2^64, for each block of `WORDS` words. A change
    of one word always changes it, other changes with a probability of 1 - 2^-63. Dtype and shape are not part of it.

    Raises:
        UnknownWeights: the values are not in memory.
    """
    digest = hashlib.sha256()
    for inner in plain_tensors(tensor.detach()):
        if inner.is_meta:
            raise UnknownWeights("the values of a tensor are on the meta device")
        octets = inner.contiguous().flatten().view(torch.uint8)
        rest = len(octets) % 8
        if rest:
            octets = torch.nn.functional.pad(octets, (0, 8 - rest))
        elif octets.storage_offset() % 8:
            octets = octets.clone()
        sums = [
            (part * _multipliers(part.device)[: len(part)]).sum()
            for part in octets.view(torch.int64).split(WORDS)
        ]
        if sums:
            digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=8)
def _multipliers(device: torch.device) -> Tensor:
    """Return (WORDS,) odd pseudo-random numbers."""
    # the mixing of SplitMix64 (Steele, Lea and Flood 2014), whose constants wrap in 64 bits with a sign
    numbers = torch.arange(1, WORDS + 1, device=device) * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27)) * -0x6B2FB644ECCEEE15
    return numbers | 1


def of_pipeline(pipeline: Any) -> str:
    """Return the fingerprint of all networks of a diffusers pipeline."""
    parts = pipeline.components.items()
    return fingerprint({n: p for n, p in parts if isinstance(p, nn.Module)})


def of_denoiser(pipeline: Any) -> str:
    """Return the rounded fingerprint of a pipeline's denoiser, which Q-Sched's factors fit."""
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    return fingerprint({"denoiser": denoiser}, rounded=True)


def _coarse(values: Tensor) -> Tensor:
    """Round values to bfloat16, and to 0 below float16's normal numbers."""
    # integers up to 256, such as codes of quantised weights, are exact in bfloat16
    nearest = values.bfloat16().float()
    return torch.where(nearest.abs() < SMALLEST, 0.0, nearest)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that hold a tensor's numbers.

    They are the tensor itself, or the inner tensors of a subclass such as torchao's.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))
