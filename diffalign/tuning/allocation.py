"""Bits of each layer for a given mean, from errors that second moments predict.

A layer's outputs err by tr(E H E^T) for the weight error E that GPTQ leaves. What that does to the prediction of the
denoiser differs between kinds of layers: text projections and modulations are nearly free. Each kind has one weight,
which is measured by rounding the layers of this kind alone. MixDQ (Zhao et al. 2024, arXiv 2405.17873) allocates bits
by measured errors, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffalign.core.errors import UsageError
from diffalign.quantization import codes
from diffalign.quantization.moments import Moments
from diffalign.quantization.rounding import curvatures
from diffalign.tuning.scales import Trajectories

ROWS = 16
"""Rows of the trajectories on which a kind of layers is measured."""
MIDDLE = 3
"""Bits at which the kinds are measured."""
Layers = Mapping[str, nn.Linear | nn.Conv2d]


@dataclass
class LayerErrors:
    """Errors and sizes of one layer at each number of bits.

    Attributes:
        weights: number of weights.
        errors: error of the outputs by bits, by the layer's own moments.
        sizes: size in bits, scales included, by bits.
    """

    weights: int
    errors: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)


def choices_for(bits_per_weight: float) -> tuple[int, ...]:
    """Return the numbers of bits among which layers choose."""
    return (2, 3, 4) if bits_per_weight <= 4 else (3, 4, 8)


def kind_of(name: str) -> str:
    """Return the kind of a layer: its name without numbers, and without the first module around it."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[1:] or parts)


def choose_bits(
    layers: Layers,
    moments: Iterable[Mapping[str, Moments]],
    trajectories: Trajectories,
    *,
    bits_per_weight: float,
    group_size: int | None,
) -> dict[str, int]:
    """Return the bits of each layer.

    Args:
        layers: layers that get packed, by name, in full precision.
        moments: result of `moments.collect_moments`. Layers without moments get the largest number of bits.
        trajectories: predictions of the model as it is.
        bits_per_weight: largest mean of the bits of these layers' weights, scales included.
        group_size: weights of a row that share a scale.

    Raises:
        UsageError: the mean is below that of the smallest number of bits.
    """
    choices = choices_for(bits_per_weight)
    table = {name: _sizes(layer, choices, group_size) for name, layer in layers.items()}
    _check(table, bits_per_weight)
    rounded = _measure(layers, moments, table, group_size)
    weights = _weights(layers, rounded, table, trajectories, group_size)
    for name, entry in table.items():
        for bits, error in entry.errors.items():
            entry.errors[bits] = error * weights[kind_of(name)]
    return allocate(table, bits_per_weight)


def allocate(table: Mapping[str, LayerErrors], bits_per_weight: float) -> dict[str, int]:
    """Return bits of least total error whose mean size is at most `bits_per_weight`.

    Steps along each layer's convex hull are taken in the order of error saved per bit, which is optimal up to the last
    step. A layer without errors keeps its largest number of bits.
    """
    bits_by_layer = {n: min(e.errors) if e.errors else max(e.sizes) for n, e in table.items()}
    free = bits_per_weight * sum(e.weights for e in table.values())
    free -= sum(table[n].sizes[bits] for n, bits in bits_by_layer.items())
    steps = [
        (-gain, number, name, bits)
        for name, entry in table.items()
        for number, (gain, bits) in enumerate(_hull(entry))
    ]
    full: set[str] = set()
    for _, _, name, bits in sorted(steps):
        cost = table[name].sizes[bits] - table[name].sizes[bits_by_layer[name]]
        if name in full or cost > free:
            full.add(name)
            continue
        bits_by_layer[name] = bits
        free -= cost
    return bits_by_layer


def _hull(entry: LayerErrors) -> Iterator[tuple[float, int]]:
    """Yield (error saved per bit, bits) of a layer's steps, the largest first."""
    points = sorted(entry.errors)
    at = 0
    while at < len(points) - 1:
        gains = [
            (
                (entry.errors[points[at]] - entry.errors[after])
                / (entry.sizes[after] - entry.sizes[points[at]]),
                after,
            )
            for after in points[at + 1 :]
        ]
        gain, bits = max(gains)
        if gain <= 0:
            return
        yield gain, bits
        at = points.index(bits)


def _sizes(
    layer: nn.Linear | nn.Conv2d, choices: Iterable[int], group_size: int | None
) -> LayerErrors:
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    scales = codes.scales_shape(rows, columns, group_size=group_size)
    return LayerErrors(
        layer.weight.numel(),
        sizes={
            bits: 8 * rows * codes.packed_shape(rows, columns, bits=bits)[1]
            + 16 * scales[0] * scales[1]
            for bits in choices
        },
    )


def _check(table: Mapping[str, LayerErrors], bits_per_weight: float) -> None:
    weights = sum(entry.weights for entry in table.values())
    least = sum(min(entry.sizes.values()) for entry in table.values()) / weights
    if bits_per_weight < least:
        raise UsageError(
            f"bits_per_weight={bits_per_weight:g} is below {least:.2f}, the mean at the smallest number of bits with "
            "its scales. Set a larger mean, or larger groups."
        )


def _measure(
    layers: Layers,
    moments: Iterable[Mapping[str, Moments]],
    table: Mapping[str, LayerErrors],
    group_size: int | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Fill the errors of the layers, and return their codes at the middle bits."""
    rounded = {}
    for name, _, curvature in curvatures(layers, moments):
        weight = layers[name].weight.detach()
        for bits in table[name].sizes:
            packed = codes.pack(weight, bits=bits, group_size=group_size, curvature=curvature)
            difference = weight.float() - codes.unpack(
                *packed, shape=weight.shape, bits=bits, group_size=group_size
            )
            error = 0.0 if curvature is None else curvature.errors(difference.flatten(1)).sum()
            table[name].errors[bits] = float(error)
            if bits == MIDDLE:
                rounded[name] = packed
    return rounded


@torch.no_grad()
def _weights(
    layers: Layers,
    rounded: Mapping[str, tuple[Tensor, Tensor]],
    table: Mapping[str, LayerErrors],
    trajectories: Trajectories,
    group_size: int | None,
) -> dict[str, float]:
    """Return the error of the prediction per error of the outputs, by kind of layers."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(trajectories.prompts), generator=generator)[:ROWS]
    weights = {}
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(kind_of(name), []).append(name)
    for kind, names in kinds.items():
        total = sum(table[n].errors.get(MIDDLE, 0.0) for n in names)
        with _in_place({n: layers[n] for n in names if n in rounded}, rounded, group_size):
            error = trajectories.mean_error(rows)
        weights[kind] = error / total if total > 0 else 0.0
    return weights


@contextmanager
def _in_place(
    layers: Layers, rounded: Mapping[str, tuple[Tensor, Tensor]], group_size: int | None
) -> Iterator[None]:
    """Give layers their rounded weights inside the context."""
    own = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = codes.unpack(
                *rounded[name],
                shape=layer.weight.shape,
                bits=MIDDLE,
                group_size=group_size,
                dtype=layer.weight.dtype,
            )
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = own[name]
