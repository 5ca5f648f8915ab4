"""Size of a model: bytes of its tensors, inner tensors of quantised weights included.

The weights of torchao, bitsandbytes, quanto and SDNQ are supported; `get_memory_footprint` of diffusers counts a
torchao weight as if it still had 16 bits. The functions work on the meta device, so a model's size can be computed
before its weights are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffalign.core.fingerprint import plain_tensors
from diffalign.quantization.branches import BranchLinear
from diffalign.quantization.layers import PackedLayer

BF16 = 2


@dataclass
class Tally:
    """Weight counts and bytes, summed over a set of layers."""

    weights: int = 0
    """Numbers that the tensors represent, biases and buffers included."""
    quantised: int = 0
    """Weights that are stored in fewer than 16 bits."""
    bytes: int = 0

    def add(self, weights: int, size: int, quantised: bool) -> None:
        self.weights += weights
        self.quantised += weights * quantised
        self.bytes += size


@dataclass
class ModuleReport:
    """Size of a module. Tensors that several layers share are counted once."""

    kinds: dict[str, Tally] = field(default_factory=dict)
    """Tallies by kind of layer: "linear", "conv" and "other"."""

    @property
    def bytes(self) -> int:
        return sum(k.bytes for k in self.kinds.values())

    @property
    def weights(self) -> int:
        return sum(k.weights for k in self.kinds.values())

    @property
    def bf16_bytes(self) -> int:
        """Return the bytes of the same module with every number in bfloat16."""
        return BF16 * self.weights

    @property
    def ratio(self) -> float:
        """Return how many times smaller than in bfloat16 the module is."""
        return self.bf16_bytes / self.bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    @property
    def quantised_fraction(self) -> float:
        return sum(k.quantised for k in self.kinds.values()) / self.weights

    def __str__(self) -> str:
        lines = [f"{'':8}{'weights':>16}{'quantised':>11}{'bytes':>16}{'bits':>7}"]
        for name, kind in [*self.kinds.items(), ("all", self._all())]:
            if kind.weights:
                share = 100 * kind.quantised / kind.weights
                bits = 8 * kind.bytes / kind.weights
                lines.append(f"{name:8}{kind.weights:16,}{share:10.1f}%{kind.bytes:16,}{bits:7.2f}")
        return "\n".join([*lines, f"{self.ratio:.2f} times smaller than in bfloat16"])

    def _all(self) -> Tally:
        kinds = self.kinds.values()
        return Tally(self.weights, sum(k.quantised for k in kinds), self.bytes)


def report(module: nn.Module) -> ModuleReport:
    """Measure a module, quantised or not, on any device."""
    sizes = ModuleReport({"linear": Tally(), "conv": Tally(), "other": Tally()})
    counted: set[Any] = set()
    for layer in module.modules():
        tally = sizes.kinds[_kind(layer)]
        for name, tensor in _tensors(layer):
            inner = [t for t in _inner(tensor) if not _is_counted(t, counted)]
            if not inner:
                continue
            size = sum(t.numel() * t.element_size() for t in inner)
            weights = _numbers(layer, name, tensor)
            tally.add(weights, size, quantised=size < BF16 * weights)
        tally.bytes += getattr(layer, "cached_bytes", 0)
    return sizes


def folder_bytes(folder: Path | str) -> int:
    """Return the bytes of all safetensors files in a folder and its subfolders."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    return "conv" if isinstance(layer, nn.Conv2d) else "other"


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters(recurse=False)
    yield from layer.named_buffers(recurse=False)


def _numbers(layer: nn.Module, name: str, tensor: Any) -> int:
    """Return how many of a model's numbers a tensor represents; 0 for scales and branches."""
    if isinstance(layer, PackedLayer) and name != "bias":
        return layer.shape.numel() if name == "weight" else 0
    by_sdnq = getattr(layer, "sdnq_dequantizer", None)
    if by_sdnq is not None and name != "bias":
        return math.prod(by_sdnq.original_shape) if name == "weight" else 0
    if isinstance(layer, BranchLinear) and name.startswith("svd_"):
        return 0
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else int(state.shape.numel())


def _inner(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of, bitsandbytes' scales included."""
    yield from plain_tensors(tensor)
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield state.absmax
        yield state.code


def _is_counted(tensor: Tensor, counted: set[Any]) -> bool:
    """Return whether the same memory was counted before, and mark it as counted."""
    location = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())
    is_counted = location in counted
    counted.add(location)
    return is_counted
