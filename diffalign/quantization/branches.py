"""SVDQuant's low-rank branch beside torchao's weights: W ~ Q(W - L1 L2) + L1 L2.

The branch has 16 bits. torchao's own format has no place for it, so a denoiser with branches is saved with a
quantisation method of its own. Without this module diffusers then says "Unknown quantization type, got
diffalign_torchao" instead of sampling from incomplete weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.quantizers import auto
from diffusers.quantizers.quantization_config import TorchAoConfig
from diffusers.quantizers.torchao import TorchAoHfQuantizer
from torch import Tensor, nn

from diffalign.core.errors import UsageError
from diffalign.quantization.lowrank import decompose
from diffalign.quantization.packed import packable, replace

BITS = 8
"""Bits to which a branch is fitted, with one scale per row: about int8 or float8."""


class Method(StrEnum):
    """Name of the quantisation method; an enumeration, because diffusers reads its `value`."""

    TORCHAO = "diffalign_torchao"


class BranchLinear(nn.Linear):
    """Linear layer with a low-rank branch.

    The effective weight is `weight` + `svd_up` (out, rank) @ `svd_down` (rank, in). The layer shares the tensors of
    the layer from which it is made.
    """

    def __init__(self, like: nn.Linear, rank: int) -> None:
        rows, columns = like.weight.shape
        super().__init__(columns, rows, bias=False, device="meta", dtype=like.weight.dtype)
        self.weight, self.bias = like.weight, like.bias
        rank = min(rank, rows, columns)
        options: dict[str, Any] = {"device": "meta", "dtype": like.weight.dtype}
        self.svd_up = nn.Parameter(torch.empty(rows, rank, **options), requires_grad=False)
        self.svd_down = nn.Parameter(torch.empty(rank, columns, **options), requires_grad=False)
        self.train(like.training)

    @torch.no_grad()
    def split(self, input_scale: Tensor | None = None) -> None:
        """Move the large part of the weight into the branch by `lowrank.decompose`.

        This happens before torchao rounds the rest.
        """
        weight = self.weight
        fitted = decompose(
            weight,
            rank=self.svd_up.shape[1],
            bits=BITS,
            group_size=None,
            input_scale=input_scale,
        )
        for name, value in (("svd_up", fitted.up), ("svd_down", fitted.down)):
            setattr(self, name, nn.Parameter(value.contiguous(), requires_grad=False))
        rest = weight.float() - fitted.up.float() @ fitted.down.float()
        self.weight = nn.Parameter(rest.to(weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.svd_down), self.svd_up)


class BranchConfig(TorchAoConfig):
    """torchao's configuration with the settings of the low-rank branches.

    The linear layers among `packed.packable` get a branch.

    Args:
        quant_type: torchao's configuration for weights only.
        svd_rank: rank of the branch.
        skip: layers without a branch, as in `packed.packable`.
        min_weights: size below which layers have no branch.
    """

    def __init__(
        self,
        quant_type: Any,
        modules_to_not_convert: list[str] | None = None,
        svd_rank: int = 0,
        skip: Sequence[str] = (),
        min_weights: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(quant_type, modules_to_not_convert)
        self.quant_method = Method.TORCHAO
        self.svd_rank, self.skip, self.min_weights = svd_rank, list(skip), min_weights

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "quant_method": self.quant_method.value}

    def make_layers(self, model: nn.Module) -> dict[str, BranchLinear]:
        """Put layers with an empty branch in the place of those that get one."""
        layers = packable(model, skip=self.skip, min_weights=self.min_weights)
        made = {}
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear):
                made[name] = BranchLinear(layer, self.svd_rank)
                replace(model, name, made[name])
        return made

    def split(self, model: nn.Module, input_scales: Mapping[str, Tensor] | None) -> None:
        """Give a loaded model's layers their branches.

        Raises:
            UsageError: a weight is not finite.
        """
        for name, layer in self.make_layers(model).items():
            if not layer.weight.isfinite().all():
                raise UsageError(
                    f"{name} cannot be quantised: its weights are not finite. Load a model with finite weights."
                )
            layer.split((input_scales or {}).get(name))


class BranchQuantizer(TorchAoHfQuantizer):
    """Quantizer that reads torchao's weights into layers with a branch."""

    quantization_config: BranchConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)
        if not self.pre_quantized:
            raise UsageError(
                f"quant_method={Method.TORCHAO.value}: a branch needs a loaded model. Use quantize_model."
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        self.quantization_config.make_layers(model)
        super()._process_model_before_weight_loading(model, *args, **kwargs)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Raise UsageError for missing tensors, which diffusers would leave on the meta device."""
        if missing_keys:
            raise UsageError(
                f"{len(missing_keys)} tensors of the quantised {type(model).__name__} are missing, for instance "
                f"{min(missing_keys)}: the folder is incomplete or of another model. Save the model again."
            )
        return missing_keys


def register() -> None:
    """Register the method with diffusers."""
    name = Method.TORCHAO.value
    auto.AUTO_QUANTIZER_MAPPING[name] = BranchQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = BranchConfig


register()
