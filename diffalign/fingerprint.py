"""Which weights something was made with: short enough to write down, and the same wherever they are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """16 hex digits of name, shape and the first values of each tensor of these modules, adapters left out."""
    digest = hashlib.sha256()
    for part_name, part in sorted(modules.items()):
        for name, tensor in sorted(part.state_dict().items()):
            if "lora_" not in name and isinstance(tensor, Tensor):
                plain = name.replace(".base_layer", "")
                digest.update(f"{part_name}.{plain} {tuple(tensor.shape)}".encode())
                for inner in plain_tensors(tensor):
                    digest.update(inner.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: itself, or the parts of a subclass such as torchao's."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))
