"""Second moments of layers' inputs, by which GPTQ rounds weights.

The moments of a layer are H = E[x x^T] over the rows x that its weight multiplies. A row is a token of a linear layer,
or the patch under the kernel of a convolution, in the order of the flattened weight. Layers that read the same tensor,
such as the projections to queries, keys and values, share one matrix. FLUX.1's 504 layers need about 65 GB in float32,
so a model is run several times if the matrices exceed the memory for them.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.core.errors import UsageError, out_of_memory

logger = logging.getLogger(__name__)
MEMORY = 4 << 30
"""Bytes of the moments that are held at once."""
ROWS = 8192
"""Rows of a layer's input that count per forward; more are sampled."""
FLOAT = 4
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs.

    Attributes:
        second: mean of x x^T over all rows, (K, K) in float32, K being the inputs of one output.
        rows: number of rows.
    """

    second: Tensor
    rows: int

    @property
    def input_scale(self) -> Tensor:
        """Root mean squares (K,) of the inputs, to which a low-rank branch is fitted."""
        return self.second.diagonal().sqrt()

    def check(self, name: str) -> None:
        """Raise UsageError if the moments of the layer `name` are not finite."""
        if not self.second.isfinite().all():
            raise UsageError(
                f"the moments of {name} are not finite: the model computes numbers that are too large while it samples "
                "the calibration prompts. Load it in bfloat16 or float32, or use rounding=nearest."
            )


@dataclass
class _Sum:
    """Sum of x x^T over rows, and their number."""

    second: Tensor
    rows: int
    generator: torch.Generator


@dataclass
class _Group:
    """Layers that read the same tensors through the same kernel; the first one's hook counts."""

    names: list[str]
    size: int
    """Inputs of one output, K."""
    sum: _Sum | None = None

    @property
    def bytes(self) -> int:
        return self.size**2 * FLOAT


class _Stop(Exception):
    """Signal that ends a run after the first forward."""


@dataclass
class _Tokens:
    """Numbers of tensor objects; a tensor that was changed in place gets a new one."""

    seen: dict[int, tuple[Any, int, int]] = field(default_factory=dict)
    count: int = 0

    def number(self, tensor: Tensor) -> int:
        reference, version, token = self.seen.get(id(tensor), (None, 0, 0))
        if reference is None or reference() is not tensor or version != tensor._version:
            self.count += 1
            token = self.count
            self.seen[id(tensor)] = ref(tensor), tensor._version, token
        return token


def is_measured(layer: nn.Module) -> bool:
    """Return whether a layer has moments: a linear layer, or a convolution without groups."""
    return getattr(layer, "groups", 1) == 1


@torch.no_grad()
def collect_moments(
    module: nn.Module,
    layers: Mapping[str, Layer],
    run: Callable[[], object],
    *,
    memory: int = MEMORY,
) -> Iterator[dict[str, Moments]]:
    """Yield the moments of layers by name, a part of the layers at a time.

    The model runs once per part, and once up to the end of its first forward. It must not change between the parts.

    Args:
        module: the model.
        layers: layers of the model by name; convolutions with groups have no moments.
        run: runs the model on its inputs, the same in every call.
        memory: bytes of the moments of a part. A part has at least one matrix.

    Yields:
        The moments of a part's layers. A layer that the model does not reach has none.

    Raises:
        UsageError: moments are not finite, the memory ends, or layers that shared an input in the first forward do not
            share it later.
    """
    measured = {name: layer for name, layer in layers.items() if is_measured(layer)}
    parts = _parts(_groups(module, measured, run), memory)
    for number, part in enumerate(parts, 1):
        try:
            yield _pass(measured, part, run)
        except Exception as error:
            if not out_of_memory(error):
                raise
            needed = sum(group.bytes for group in part) / 2**30
            raise UsageError(
                f"calibration_memory={memory / 2**30:g}: memory ended in pass {number} of {len(parts)}, whose moments "
                f"take {needed:.2f} GiB. Lower calibration_memory, or the batch size."
            ) from error


def _pass(
    layers: Mapping[str, Layer], part: Sequence[_Group], run: Callable[[], object]
) -> dict[str, Moments]:
    """Run the model once, and return the moments of a part's layers."""
    with _counting(layers, part):
        run()
    moments: dict[str, Moments] = {}
    for group in part:
        if group.sum is not None:
            shared = Moments(group.sum.second.div_(group.sum.rows), group.sum.rows)
            shared.check(group.names[0])
            moments |= dict.fromkeys(group.names, shared)
        group.sum = None
    return moments


def _parts(groups: Sequence[_Group], memory: int) -> list[list[_Group]]:
    """Split groups, in their order, into parts that fit into the memory."""
    parts: list[list[_Group]] = []
    free = 0
    for group in groups:
        if not parts or group.bytes > free:
            parts.append([])
            free = memory
        parts[-1].append(group)
        free -= group.bytes
    return parts


def _groups(
    module: nn.Module, layers: Mapping[str, Layer], run: Callable[[], object]
) -> list[_Group]:
    """Find the layers that read the same tensors, in the first forward of a run."""
    tokens = _Tokens()
    reads: dict[str, tuple[int, ...]] = {name: () for name in layers}

    def hook(name: str) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            reads[name] += (tokens.number(args[0]),)

        return read

    def stop(*_: object) -> None:
        raise _Stop

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    handles.append(module.register_forward_hook(stop))
    try:
        run()
    except _Stop:
        # the inputs of all layers are counted: the rest of the run is not needed
        pass
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[Any, _Group] = {}
    for name, layer in layers.items():
        # a layer that was not reached yet shares with no other
        key = (reads[name], _geometry(layer)) if reads[name] else name
        size = layer.weight[0].numel()
        groups.setdefault(key, _Group([], size)).names.append(name)
    return list(groups.values())


def _geometry(layer: Layer) -> tuple[Any, ...]:
    """Return what makes rows of a layer's input."""
    if isinstance(layer, nn.Linear):
        return ()
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode


@contextmanager
def _counting(layers: Mapping[str, Layer], groups: Sequence[_Group]) -> Iterator[None]:
    """Add the inputs of groups up inside the context."""
    tokens = _Tokens()
    handles = []
    for group in groups:
        read: list[int] = []
        for name in group.names:
            hook = _hook(name, group, tokens, read)
            handles.append(layers[name].register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, group: _Group, tokens: _Tokens, read: list[int]) -> Callable[..., None]:
    """Return the hook of one layer. The others of its group check that they read the same."""
    leads = name == group.names[0]
    calls = 0

    def count(layer: Layer, args: tuple[Tensor, ...]) -> None:
        nonlocal calls
        token = tokens.number(args[0])
        if leads:
            read.append(token)
            _add(group, layer, args[0].detach())
        elif len(read) <= calls or read[calls] != token:
            raise UsageError(
                f"{name} and {group.names[0]} read the same tensor in the first forward and different ones later, so "
                "they cannot share moments. Use rounding=nearest for this model."
            )
        calls += 1

    return count


def _add(group: _Group, layer: Layer, value: Tensor) -> None:
    """Add one input of a group's first layer."""
    if group.sum is None:
        zeros = torch.zeros(group.size, group.size, device=value.device)
        # the sample of rows depends on the layer only, not on the parts
        seed = zlib.crc32(group.names[0].encode())
        group.sum = _Sum(zeros, 0, torch.Generator().manual_seed(seed))
    rows = _rows(layer, value, group.sum.generator).float()
    group.sum.second.addmm_(rows.mT, rows)
    group.sum.rows += len(rows)


def _rows(layer: Layer, value: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows (N, K) of a layer's input, at most `ROWS`."""
    if isinstance(layer, nn.Linear):
        rows = value.flatten(0, -2) if value.dim() > 1 else value[None]
        return rows[_sample(len(rows), generator).to(value.device)] if len(rows) > ROWS else rows
    value = value if value.dim() > 3 else value[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(value, layer._reversed_padding_repeated_twice, mode=mode)
    patches = _patches(layer, padded)
    batch, height, width = patches.shape[:3]
    number = batch * height * width
    places = _sample(number, generator) if number > ROWS else torch.arange(number)
    places = places.to(value.device)
    image, place = places // (height * width), places % (height * width)
    return patches[image, place // width, place % width].flatten(1)


def _sample(number: int, generator: torch.Generator) -> Tensor:
    """Draw `ROWS` different numbers below `number`, in ascending order."""
    return torch.randperm(number, generator=generator)[:ROWS].sort().values


def _patches(layer: nn.Conv2d, padded: Tensor) -> Tensor:
    """Return the patches under a kernel, a view (B, H, W, C, *kernel_size)."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    sides = [
        (padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    image, channel, row, column = padded.stride()
    return padded.as_strided(
        (padded.shape[0], *sides, padded.shape[1], *kernel),
        (
            image,
            row * stride[0],
            column * stride[1],
            channel,
            row * dilation[0],
            column * dilation[1],
        ),
        padded.storage_offset(),
    )
