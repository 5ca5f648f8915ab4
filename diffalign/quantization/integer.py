"""Linear layers that multiply 8-bit or 4-bit weights by 8-bit inputs.

The scales of the inputs are calibrated for each timestep. A few-step model has N timesteps, so a layer needs N scales,
and none is computed during sampling. Shang et al. 2023 ("PTQ4DM", arXiv 2211.15736) have both the calibration and the
idea of scales by timestep. With `token_scales` each row of an input has a scale of its own instead, its largest
magnitude over 127, which is measured in every forward and needs no calibration. Codes of 4 bits become int8 before they
are multiplied: once on a CPU, and in every forward on CUDA.

On CPUs with AMX or VNNI the product is oneDNN's. It needs the weights in its own order, so they are in memory twice,
and unsigned inputs, so codes are offset by 128; signed inputs would use its reference kernel without AMX. On CUDA the
product is `torch._int_mm`. Where neither works, and where gradients pass, a layer multiplies unpacked weights like any
packed layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.quantization import codes
from diffalign.quantization.layers import PackedConv2d, PackedLinear, PackSpec

TIMESTEP = "timestep"
"""Name of the timestep argument in denoisers of diffusers."""
CONVOLUTION_GROUP = 64
"""Weights of a convolution that share a scale, beside linear layers with token scales."""
ZERO_POINT = 128
"""Code of 0 among unsigned codes."""


class StepClock:
    """Index of the calibrated timestep that is nearest to the denoiser's current one.

    Args:
        timesteps: calibrated timesteps in the denoiser's own units.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = list(timesteps)
        self.index = 0

    def attach(self, model: nn.Module) -> None:
        """Read the timestep of every forward and connect all integer layers of the model."""
        model.register_forward_pre_hook(self._read_timestep, with_kwargs=True)
        for layer in model.modules():
            if isinstance(layer, IntegerLinear):
                layer.clock = self

    def _read_timestep(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Find the calibrated timestep nearest to the one of this forward.

        It is a method, so that a copy of the model updates the copy of its clock.
        """
        timestep = timestep_of(model, args, kwargs)
        distances = [abs(t - timestep) for t in self.timesteps]
        self.index = distances.index(min(distances))


def timestep_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the timestep of the first batch row, read from the arguments of `model.forward`."""
    timestep = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments[TIMESTEP]
    return float(torch.as_tensor(timestep).flatten()[0])


class IntegerLinear(PackedLinear):
    """Packed layer with one input scale per calibrated timestep, or per row of the input.

    The scales are the bfloat16 bits in `activation_scale`. A scale of 0 means that calibration did not reach the
    layer; its inputs are then not rounded.
    """

    activation_scale: Tensor
    clock: StepClock

    def __init__(self, like: nn.Linear, spec: PackSpec) -> None:
        super().__init__(like, spec)
        if spec.activation_steps:
            self._set_frozen(
                "activation_scale",
                torch.zeros(spec.activation_steps, dtype=torch.int16, device="meta"),
            )
        self.clock = StepClock([0.0])
        self._scales: tuple[Any, list[float]] = (None, [])
        self._ready: tuple[Any, Any] = (None, None)

    def calibrate(self, scales: Tensor | None) -> None:
        """Set the scales (timesteps,). Set zeros if `scales` is None, and nothing if rows have their own."""
        if self.spec.token_scales:
            return
        if scales is None:
            scales = torch.zeros(self.spec.activation_steps)
        self._set_frozen(
            "activation_scale", scales.bfloat16().view(torch.int16).to(self.weight.device)
        )

    def forward(self, input: Tensor) -> Tensor:
        by_token = self.spec.token_scales
        scale: float | Tensor = 1.0 if by_token else self._input_scale()
        rows = input[..., 0].numel()
        gradients = torch.is_grad_enabled() and input.requires_grad
        if gradients or not scale or not self._multiplies(input.device, rows):
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        values = input.reshape(rows, self.in_features)
        if by_token:
            values = values.float()
            scale = values.abs().amax(1, keepdim=True) / 127
            scale = torch.where(scale == 0, 1, scale)
        integers = (values * (1 / scale)).round_().clamp_(-128, 127)
        out = self._integers(integers, scale, input.dtype).view(*input.shape[:-1], -1)
        if self.svd_up is not None and self.svd_down is not None:
            out = out + self._branch(
                input, self.svd_down.to(input.dtype), self.svd_up.to(input.dtype)
            )
        return out

    @property
    def cached_bytes(self) -> int:
        """Return the bytes of the second copy of the weights."""
        return 0 if self._ready[1] is None else self.shape.numel()

    def _input_scale(self) -> float:
        """Return the scale at the clock's timestep. The tensor is read only when it changes."""
        key = id(self.activation_scale), self.activation_scale._version
        if self._scales[0] != key:
            scales = self.activation_scale.detach().view(torch.bfloat16).float().tolist()
            self._scales = key, scales
        return self._scales[1][self.clock.index]

    def _multiplies(self, device: torch.device, rows: int) -> bool:
        if not rows:
            return False
        # These are the limits of cuBLAS.
        if device.type == "cuda":
            return rows > 16 and self.in_features % 8 == 0 and self.out_features % 8 == 0
        return device.type == "cpu" and _multiplies_on_cpu()

    def _integers(self, inputs: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply codes of inputs (rows, K) with those of the weights, and apply both scales."""
        weight_scale = self.weight_scale.view(torch.bfloat16).flatten().float()
        bias = None if self.bias is None else self.bias.float()
        if inputs.device.type == "cpu":
            if not isinstance(scale, Tensor):
                return self._by_onednn(inputs, scale, weight_scale, bias, dtype)
            # oneDNN takes one scale for all rows
            out = self._by_onednn(inputs, 1.0, weight_scale, None, torch.float32).mul_(scale)
        else:
            weight = self._weight_codes()
            out = torch._int_mm(inputs.to(torch.int8), weight.t()).float() * (weight_scale * scale)
        return (out if bias is None else out + bias).to(dtype)

    def _by_onednn(
        self,
        inputs: Tensor,
        scale: float,
        weight_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        ready = self._in_onednn_order()
        tail: tuple[Any, ...] = (bias, 1.0, 0, dtype, "none", [], "")
        unsigned = (inputs + ZERO_POINT).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, scale, ZERO_POINT, ready, weight_scale, zeros, *tail
        )
        return product

    def _weight_codes(self) -> Tensor:
        """Return the codes of the weights (out, in) in int8."""
        # oneDNN reads the memory of a view without regard to its strides
        return codes.split(self.weight.detach(), self.in_features, bits=self.spec.bits).contiguous()

    def _in_onednn_order(self) -> Tensor:
        key = id(self.weight), self.weight._version
        if self._ready[0] != key:
            self._ready = key, torch.ops.onednn.qlinear_prepack(self._weight_codes(), None)
        ready: Tensor = self._ready[1]
        return ready

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without cached values, which hold references to the parameters."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_scales": (None, []), "_ready": (None, None)}


@cache
def _multiplies_on_cpu() -> bool:
    """Return whether this CPU sums products of integers exactly.

    Without VNNI or AMX, sums would saturate at 16 bits.
    """
    fast = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and fast


def packed_like(
    layer: nn.Linear | nn.Conv2d, spec: PackSpec
) -> PackedLinear | PackedConv2d | IntegerLinear:
    """Return an empty packed layer with the same geometry and bias."""
    if isinstance(layer, nn.Conv2d):
        if spec.token_scales:
            # convolutions multiply unpacked weights, which may have a scale for each group
            spec = replace(spec, group_size=CONVOLUTION_GROUP, token_scales=False)
        return PackedConv2d(layer, spec)
    return IntegerLinear(layer, spec) if spec.multiplies else PackedLinear(layer, spec)
