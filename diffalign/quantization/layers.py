"""Layers whose weights are packed codes: pure PyTorch, for any device, convolutions too.

A forward unpacks one weight, uses it and lets it go. So does the backward to a layer's input: LoRA trains over packed
weights without a full-size copy of any of them being kept (QLoRA, Dettmers et al. 2023). The layers are nn.Linear and
nn.Conv2d to peft, which attaches its adapters to them; merging an adapter into the integers fails. DoRA is for linear
layers only: peft 0.21 takes a convolution's codes for its weights.

A layer may carry SVDQuant's low-rank branch (Li et al. 2024, see `lowrank`), which is part of the layer and not an
adapter, so that no switching of adapters turns it off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from diffalign.core.errors import UsageError
from diffalign.quantization import codes
from diffalign.quantization.lowrank import decompose

Pair = tuple[int, int]


@dataclass(frozen=True)
class PackSpec:
    """How weights are packed.

    Args:
        bits: 4 or 8.
        group_size: weights of an output's row (input channels, height and width flattened) that share a scale; None:
            the whole row.
        svd_rank: of the low-rank branch in 16 bits; 0: none.
        activation_steps: timesteps for which the inputs of linear layers have scales, so that they are multiplied as
            integers (see `integer`); 0: inputs keep 16 bits.
    """

    bits: int = 4
    group_size: int | None = 64
    svd_rank: int = 0
    activation_steps: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"bits must be 4 or 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(
                f"group_size must be positive, or None for whole rows, not {self.group_size}"
            )
        if self.svd_rank < 0:
            raise UsageError(f"svd_rank must not be negative, is {self.svd_rank}")
        if self.activation_steps and (self.bits, self.group_size) != (8, None):
            raise UsageError("integer products take 8 bits and one scale for each row of weights")


class PackedLayer(nn.Module):
    """What both layers share. `weight` holds the codes; `weight_scale` the scales' bits in int16, so that no cast of
    the model, no loader and no autocast can round them."""

    channel_dim: ClassVar[int]
    """Of outputs."""
    weight: Tensor
    weight_scale: Tensor
    bias: Any
    svd_up: nn.Parameter | None
    svd_down: nn.Parameter | None

    def _hold(self, like: nn.Linear | nn.Conv2d, spec: PackSpec) -> None:
        """Empty tensors on the meta device; the bias is the other layer's own."""
        self.spec = spec
        self.shape = like.weight.shape
        rows, columns = self.shape[0], self.shape[1:].numel()
        sizes = {
            "weight": (
                self._as_deep(codes.packed_shape(rows, columns, bits=spec.bits)),
                torch.int8,
            ),
            "weight_scale": (
                codes.scales_shape(rows, columns, group_size=spec.group_size),
                torch.int16,
            ),
        }
        branches = getattr(like, "groups", 1) == 1
        rank = min(spec.svd_rank, rows, columns) if branches else 0
        self.svd_up = self.svd_down = None
        if rank:
            sizes |= {
                "svd_up": ((rows, rank), like.weight.dtype),
                "svd_down": ((rank, columns), like.weight.dtype),
            }
        for name, (size, dtype) in sizes.items():
            self._keep(name, torch.empty(size, dtype=dtype, device="meta"))
        self.bias = like.bias
        self.train(like.training)

    def _as_deep(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """With as many dimensions as the weight has: peft makes a convolution's adapter with these."""
        return *shape, *(1 for _ in self.shape[2:])

    def _keep(self, name: str, value: Tensor) -> None:
        setattr(self, name, nn.Parameter(value.contiguous(), requires_grad=False))

    def fill(self, weight: Tensor, *, name: str, input_scale: Tensor | None = None) -> None:
        """Take over a weight in the layer's shape.

        Args:
            weight: on the device where the codes shall be.
            name: of the layer, for messages.
            input_scale: (input channels,) root mean squares of the layer's inputs, which the branch is fitted to.

        Raises:
            UsageError: the weight is not finite.
        """
        if not weight.isfinite().all():
            raise UsageError(f"{name} cannot be quantised: its weights are not finite")
        bits, group_size = self.spec.bits, self.spec.group_size
        if self.svd_up is None:
            packed, scales = codes.pack(weight, bits=bits, group_size=group_size)
        else:
            fitted = decompose(
                weight,
                rank=self.svd_up.shape[1],
                bits=bits,
                group_size=group_size,
                input_scale=input_scale,
            )
            packed, scales = fitted.packed, fitted.scales
            self._keep("svd_up", fitted.up.to(self.svd_up.dtype))
            self._keep("svd_down", fitted.down.to(self.svd_up.dtype))
        self._keep("weight", packed.view(self._as_deep(packed.shape)))
        self._keep("weight_scale", scales.view(torch.int16))

    @property
    def W_q(self) -> Tensor:
        """By this name peft knows a layer that it has to ask for `dequantize()`, as DoRA does."""
        return self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that forwards multiply with, branch included."""
        weight = self._unpack(self.weight, self.weight_scale, dtype)
        if self.svd_up is not None and self.svd_down is not None:
            branch = self.svd_up.to(dtype) @ self.svd_down.to(dtype)
            weight = weight + branch.view(self.shape)
        return weight

    def _unpack(self, packed: Tensor, scale_bits: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.unpack(
            packed.flatten(1),
            scale_bits.view(torch.bfloat16),
            shape=self.shape,
            bits=self.spec.bits,
            group_size=self.spec.group_size,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        dtype = input.dtype
        input = self._padded(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        if torch.is_grad_enabled() and input.requires_grad:
            out = _Product.apply(input, bias, self.weight, self.weight_scale, self)
        else:
            out = self._product(input, self._unpack(self.weight, self.weight_scale, dtype), bias)
        if self.svd_up is not None and self.svd_down is not None:
            out = out + self._branch(input, self.svd_down.to(dtype), self.svd_up.to(dtype))
        return out

    def _padded(self, input: Tensor) -> Tensor:
        return input

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _transposed(self, grad: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        """The gradient for the input."""
        raise NotImplementedError

    def _branch(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{super().extra_repr()}, bits={spec.bits}, group_size={spec.group_size}, svd_rank={spec.svd_rank}"


class PackedLinear(PackedLayer, nn.Linear):
    """A linear layer with packed weights, empty until `fill`, with another's geometry and bias."""

    channel_dim = -1

    def __init__(self, like: nn.Linear, spec: PackSpec) -> None:
        nn.Linear.__init__(
            self, like.in_features, like.out_features, like.bias is not None, device="meta"
        )
        self._hold(like, spec)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    def _transposed(self, grad: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        return grad @ weight

    def _branch(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(input, down), up)


class PackedConv2d(PackedLayer, nn.Conv2d):
    """A convolution with packed weights, empty until `fill`, with another's geometry and bias."""

    channel_dim = -3

    def __new__(cls, like: Any = None, *args: Any, **kwargs: Any) -> Any:
        """peft makes an adapter by calling the type of the convolution that gets it, as nn.Conv2d is called."""
        return nn.Conv2d(like, *args, **kwargs) if isinstance(like, int) else super().__new__(cls)

    def __init__(self, like: nn.Conv2d, spec: PackSpec) -> None:
        nn.Conv2d.__init__(
            self,
            like.in_channels,
            like.out_channels,
            cast(Pair, like.kernel_size),
            stride=cast(Pair, like.stride),
            padding=cast(Pair | str, like.padding),
            dilation=cast(Pair, like.dilation),
            groups=like.groups,
            bias=like.bias is not None,
            padding_mode=like.padding_mode,
            device="meta",
        )
        self._hold(like, spec)

    def _padded(self, input: Tensor) -> Tensor:
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return input
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, self._reversed_padding_repeated_twice, mode=mode)

    @property
    def _geometry(self) -> tuple[Any, ...]:
        inside = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        return self.stride, self.padding if inside else (0, 0), self.dilation, self.groups

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight, bias, *self._geometry)

    def _transposed(self, grad: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        return conv2d_input(input_shape, weight, grad, *self._geometry)

    def _branch(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        middle = F.conv2d(input, down.unflatten(1, self.shape[1:]), None, *self._geometry)
        return F.conv2d(middle, up[..., None, None])


class _Product(torch.autograd.Function):
    """A layer's product with its unpacked weight, which is unpacked again in the backward instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, packed: Tensor, scale: Tensor, layer: Any
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.layer, ctx.input_shape = layer, input.shape
        return layer._product(input, layer._unpack(packed, scale, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.layer._unpack(*ctx.saved_tensors, grad.dtype)
        bias = None
        if ctx.needs_input_grad[1]:
            channels = grad.movedim(ctx.layer.channel_dim, -1)
            bias = channels.reshape(-1, channels.shape[-1]).sum(0)
        return ctx.layer._transposed(grad, weight, ctx.input_shape), bias, None, None, None
