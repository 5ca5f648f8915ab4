"""Layers with packed weights in pure PyTorch, convolutions included, for any device.

A forward unpacks one weight, uses it and frees it; the backward to a layer's input does the same. So LoRA trains over
packed weights without a full-size copy of any of them (QLoRA, Dettmers et al. 2023). To peft the layers are nn.Linear
and nn.Conv2d, and it attaches its adapters to them; merging an adapter into the integers fails. DoRA works for linear
layers only: peft 0.21 takes a convolution's codes for its weights.

A layer may have SVDQuant's low-rank branch (Li et al. 2024, see `lowrank`). The branch is a part of the layer and not
an adapter, so switching adapters does not disable it.
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
from diffalign.quantization.rounding import Curvature

Pair = tuple[int, int]


@dataclass(frozen=True)
class PackSpec:
    """Settings of packed weights.

    Args:
        bits: 8, 4, 3 or 2.
        group_size: weights of an output's row (input channels, height and width flattened) that share a scale; None
            for the whole row.
        svd_rank: rank of the low-rank branch in 16 bits; 0 for none.
        activation_steps: timesteps for which the inputs of linear layers have scales, so that integers are multiplied
            (see `integer`); 0 for inputs in 16 bits.
        token_scales: True if each row of a linear layer's input gets a scale of its own when it is multiplied.
    """

    bits: int = 4
    group_size: int | None = 64
    svd_rank: int = 0
    activation_steps: int = 0
    token_scales: bool = False

    def __post_init__(self) -> None:
        if self.bits not in codes.PLANES:
            raise UsageError(f"bits={self.bits}: there is no such format. Set 8, 4, 3 or 2.")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(
                f"group_size must be positive, or None for whole rows, not {self.group_size}."
            )
        if self.svd_rank < 0:
            raise UsageError(f"svd_rank must be 0 or larger, not {self.svd_rank}.")
        if self.multiplies and (self.bits not in (8, 4) or self.group_size is not None):
            raise UsageError(
                f"bits={self.bits}, group_size={self.group_size}: integer products need 8 or 4 bits and one scale for "
                "each row of weights. Set bits=8 and group_size=None."
            )

    @property
    def multiplies(self) -> bool:
        """True if linear layers multiply integers."""
        return self.activation_steps > 0 or self.token_scales


class PackedLayer(nn.Module):
    """Common part of packed linear layers and convolutions.

    The parameter `weight` holds the codes. The parameter `weight_scale` holds the bits of the scales as int16, so that
    no cast of the model, no loader and no autocast rounds them.
    """

    channel_dim: ClassVar[int]
    """Dimension of the output channels."""
    weight: Tensor
    weight_scale: Tensor
    bias: Any
    svd_up: nn.Parameter | None
    svd_down: nn.Parameter | None

    def _allocate(self, like: nn.Linear | nn.Conv2d, spec: PackSpec) -> None:
        """Create empty tensors on the meta device, and share the other layer's bias."""
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
            self._set_frozen(name, torch.empty(size, dtype=dtype, device="meta"))
        self.bias = like.bias
        self.train(like.training)

    def _as_deep(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Append dimensions of 1 up to the weight's number, which peft reads for convolutions."""
        return *shape, *(1 for _ in self.shape[2:])

    def _set_frozen(self, name: str, value: Tensor) -> None:
        setattr(self, name, nn.Parameter(value.contiguous(), requires_grad=False))

    def fill(
        self,
        weight: Tensor,
        *,
        name: str,
        input_scale: Tensor | None = None,
        curvature: Curvature | None = None,
    ) -> None:
        """Pack a weight of the layer's shape.

        Args:
            weight: weight on the device on which the codes shall be.
            name: name of the layer, for messages.
            input_scale: root mean squares (input channels,) or (K,) of the layer's inputs, to which the branch is
                fitted.
            curvature: prepared moments of the layer's inputs, for codes by GPTQ; None for the nearest codes.

        Raises:
            UsageError: the weight is not finite.
        """
        if not weight.isfinite().all():
            raise UsageError(
                f"{name} cannot be quantised: its weights are not finite. Load a model with finite weights."
            )
        bits, group_size = self.spec.bits, self.spec.group_size
        if self.svd_up is None:
            packed, scales = codes.pack(
                weight, bits=bits, group_size=group_size, curvature=curvature
            )
        else:
            fitted = decompose(
                weight,
                rank=self.svd_up.shape[1],
                bits=bits,
                group_size=group_size,
                input_scale=input_scale,
                curvature=curvature,
            )
            packed, scales = fitted.packed, fitted.scales
            self._set_frozen("svd_up", fitted.up.to(self.svd_up.dtype))
            self._set_frozen("svd_down", fitted.down.to(self.svd_up.dtype))
        self._set_frozen("weight", packed.view(self._as_deep(packed.shape)))
        self._set_frozen("weight_scale", scales.view(torch.int16))

    @property
    def W_q(self) -> Tensor:
        """Return the codes.

        By this name peft recognises layers that it must ask for `dequantize()`, as for DoRA.
        """
        return self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that forwards multiply with, branch included."""
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
        # the meta device has no autocast
        if kind != "meta" and torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        dtype = input.dtype
        input = self._padded(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        out: Tensor
        if torch.is_grad_enabled() and input.requires_grad:
            out = _Product.apply(input, bias, self.weight, self.weight_scale, self)  # type: ignore[no-untyped-call]
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
        """Return the gradient for the input."""
        raise NotImplementedError

    def _branch(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{super().extra_repr()}, bits={spec.bits}, group_size={spec.group_size}, svd_rank={spec.svd_rank}"


class PackedLinear(PackedLayer, nn.Linear):
    """Linear layer with packed weights, empty until `fill`.

    Geometry and bias are those of another layer.
    """

    channel_dim = -1

    def __init__(self, like: nn.Linear, spec: PackSpec) -> None:
        nn.Linear.__init__(
            self, like.in_features, like.out_features, like.bias is not None, device="meta"
        )
        self._allocate(like, spec)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    def _transposed(self, grad: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        return grad @ weight

    def _branch(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(input, down), up)


class PackedConv2d(PackedLayer, nn.Conv2d):
    """Convolution with packed weights, empty until `fill`.

    Geometry and bias are those of another layer.
    """

    channel_dim = -3

    def __new__(cls, like: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return an nn.Conv2d if called like one.

        For an adapter peft calls the type of the convolution with the arguments of nn.Conv2d.
        """
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
        self._allocate(like, spec)

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
        gradient: Tensor = conv2d_input(input_shape, weight, grad, *self._geometry)
        return gradient

    def _branch(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        middle = F.conv2d(input, down.unflatten(1, self.shape[1:]), None, *self._geometry)
        return F.conv2d(middle, up[..., None, None])


class _Product(torch.autograd.Function):
    """Product with an unpacked weight, which the backward unpacks again instead of saving it."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, packed: Tensor, scale: Tensor, layer: Any
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.layer, ctx.input_shape = layer, input.shape
        out: Tensor = layer._product(input, layer._unpack(packed, scale, input.dtype), bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.layer._unpack(*ctx.saved_tensors, grad.dtype)
        bias = None
        if ctx.needs_input_grad[1]:
            channels = grad.movedim(ctx.layer.channel_dim, -1)
            bias = channels.reshape(-1, channels.shape[-1]).sum(0)
        return ctx.layer._transposed(grad, weight, ctx.input_shape), bias, None, None, None
