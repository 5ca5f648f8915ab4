"""Packed layers whose scales and biases are trained while their codes are frozen.

The second stage of decoupleQ (Guo et al. 2024, arXiv 2404.12759) tunes scales, zero points and norms block by block.
Here a factor for each scale and the biases are tuned on the predictions of the whole denoiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign.quantization.layers import PackedLayer


class TunedLayer:
    """Factors on the scales of a packed layer, and its bias in float32.

    Attributes:
        factor: factor (rows, groups) of every scale.
        bias: bias (rows,); None if the layer has none.
    """

    def __init__(self, layer: PackedLayer) -> None:
        self.layer = layer
        self.factor = nn.Parameter(torch.ones(layer.weight_scale.shape, device=layer.weight.device))
        self.bias = (
            None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        )

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer's output. The backward unpacks the weight again instead of keeping it."""
        out: Tensor = checkpoint(self._output, input, use_reentrant=False, preserve_rng_state=False)
        return out

    def _output(self, input: Tensor) -> Tensor:
        layer, kind = self.layer, input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        dtype = input.dtype
        plain = layer._unpack(layer.weight, layer.weight_scale, torch.float32).flatten(1)
        columns = plain.shape[1]
        group = layer.spec.group_size or columns
        factors = self.factor.repeat_interleave(group, 1)[:, :columns]
        weight = (plain * factors).view(layer.shape).to(dtype)
        input = layer._padded(input)
        out = layer._product(input, weight, None if self.bias is None else self.bias.to(dtype))
        if layer.svd_up is not None and layer.svd_down is not None:
            out = out + layer._branch(input, layer.svd_down.to(dtype), layer.svd_up.to(dtype))
        return out

    @torch.no_grad()
    def fold(self) -> None:
        """Write the factors, rounded with their scales to bfloat16, and the bias into the layer."""
        layer = self.layer
        scales = layer.weight_scale.view(torch.bfloat16).float() * self.factor
        layer._set_frozen("weight_scale", scales.bfloat16().view(torch.int16))
        if self.bias is not None:
            layer.bias.copy_(self.bias)


@contextmanager
def tunable(model: nn.Module) -> Iterator[dict[str, TunedLayer]]:
    """Make the scales and biases of packed layers trainable inside the context.

    Nothing else of the model is trained. At the end the layers compute as before, with what was folded into them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = {n: TunedLayer(m) for n, m in model.named_modules() if isinstance(m, PackedLayer)}
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for tuned in layers.values():
            # an attribute of the instance, so that the layer keeps its place, its hooks and its type
            vars(tuned.layer)["forward"] = tuned.forward
        yield layers
    finally:
        for tuned in layers.values():
            vars(tuned.layer).pop("forward", None)
        for parameter in trained:
            parameter.requires_grad_(True)


def parameters_of(layers: dict[str, TunedLayer]) -> list[dict[str, Any]]:
    """Return two groups of parameters for an optimiser: factors, then biases."""
    factors = [tuned.factor for tuned in layers.values()]
    biases = [tuned.bias for tuned in layers.values() if tuned.bias is not None]
    return [{"params": factors}, {"params": biases}]
