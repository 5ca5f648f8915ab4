"""Matrices of several modules in one: queries, keys and values in the releases of FLUX and SD3.

Several LoRAs of rank r become one of rank n r, block-diagonal, with alpha n alpha: the same update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.lora.layer import Layer
from diffalign.lora.names import Place, block_numbers

Matrices = tuple[Tensor, Tensor, float]
"""Down (r, in), up (out, r) and alpha."""
MLP_RATIO = 4


def join(
    layers: Mapping[str, Layer], table: Mapping[str, Sequence[str]], *, family: str
) -> list[tuple[str, Matrices]]:
    """Return (release's name, matrices) of all layers; UsageError for a module without a name there."""
    joined, left = [], set(layers)
    for pattern, parts in table.items():
        for number in sorted({n for part in parts for n in block_numbers(part, left)}):
            modules = [part.format(number) for part in parts]
            down, up, alpha = _stack(layers, modules)
            joined.append((pattern.format(number), (down, swap(modules[0], down, up), alpha)))
            left -= set(modules)
    if left:
        raise UsageError(
            f"kohya's keys for {family} have no name for {', '.join(sorted(left)[:3])}"
        )
    return joined


def split(place: Place, down: Tensor, up: Tensor, alpha: float) -> Iterator[tuple[str, Matrices]]:
    """Yield (module, matrices) of what one matrix holds.

    A LoRA that is not block-diagonal shares its `down` among the modules.
    """
    modules = place.modules
    if len(modules) == 1:
        own = swap(modules[0], down, up) if place.released else up
        yield modules[0], (down, own, alpha)
        return
    total, features = down.shape[:2]
    widths = [_width(n, features) for n in modules]
    if sum(widths) != up.shape[0]:
        raise UsageError(
            f"{', '.join(modules)} have {sum(widths)} outputs together, and the LoRA of their common matrix has "
            f"{up.shape[0]}"
        )
    ups = up.split(widths)
    rank = total // len(modules)
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(modules))]
    diagonal = total % len(modules) == 0 and torch.equal(
        up, torch.block_diag(*(u[:, b] for u, b in zip(ups, blocks, strict=True)))
    )
    for name, part, block in zip(modules, ups, blocks, strict=True):
        if not diagonal:
            yield name, (down, part, alpha)
        elif part[:, block].any() or down[block].any():
            yield name, (down[block], part[:, block], alpha * rank / total)


def swap(module: str, down: Tensor, up: Tensor) -> Tensor:
    """Return `up` with its halves exchanged for modulations in another order.

    A release has (shift, scale), diffusers (scale, shift).

    These are the last modulation, and the context's in SD3's last block, which has no gate.
    """
    continuous = module.endswith(("norm1_context.linear", "norm_out.linear"))
    if continuous and up.shape[0] == 2 * down.shape[1]:
        return torch.cat(up.chunk(2)[::-1])
    return up


def _width(name: str, features: int) -> int:
    """Return the outputs of one of several stacked modules, from its inputs."""
    return MLP_RATIO * features if name.endswith("proj_mlp") else features


def _stack(layers: Mapping[str, Layer], modules: Sequence[str]) -> Matrices:
    """Return one LoRA for stacked modules, zero for modules without one, in one scale."""
    present = [n for n in modules if n in layers]
    first = layers[present[0]]
    if len(modules) == 1:
        return first.down, first.up, first.alpha
    features = first.down.shape[1]
    # a scale of 0 cannot be another one's unit
    scale = next((layers[n].scale for n in present if layers[n].scale), 1.0)
    downs, ups = [], []
    for name in modules:
        layer = layers.get(name)
        if layer is not None:
            downs.append(layer.down)
            ups.append(layer.up * (layer.scale / scale))
        else:
            downs.append(first.down.new_zeros(first.rank, features))
            ups.append(first.down.new_zeros(_width(name, features), first.rank))
    down = torch.cat(downs)
    return down, torch.block_diag(*ups), scale * down.shape[0]
