"""Packed weights as a quantisation method of diffusers and transformers: a saved folder loads with stock classes.

Importing this module registers the method, and that of `branches`; a stock program that loads such a folder needs that
one import. Without it diffusers says "Unknown quantization type, got diffalign_packed". Denoisers can be packed while
they are loaded (`from_pretrained(..., quantization_config=PackedConfig())`), text encoders only in place
(`backends.quantize_model`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import transformers.quantizers.auto
import transformers.utils.quantization_config
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

import diffalign.quantization.branches  # noqa: F401 (registers itself)
from diffalign.core.errors import UsageError
from diffalign.quantization.integer import StepClock, packed_like
from diffalign.quantization.layers import PackedLayer, PackSpec
from diffalign.quantization.packed import MIN_WEIGHTS, SKIP, packable, replace

FORMAT = 1


class Method(StrEnum):
    """An enumeration because diffusers asks a method for its `value`."""

    PACKED = "diffalign_packed"


class PackedConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=)` takes and a model's config.json keeps.

    Args:
        bits: 4 or 8.
        group_size: weights that share a scale; None: a whole row.
        skip: layers that keep their weights, as in `packed.packable`.
        min_weights: smaller layers keep theirs, too.
        svd_rank: of SVDQuant's low-rank branch; 0: none.
        activation_timesteps: for which the inputs of linear layers have scales, in the denoiser's units; none: inputs
            keep 16 bits.

    Raises:
        UsageError: a value out of range, or a folder of a later format.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = 64,
        skip: Sequence[str] = SKIP,
        min_weights: int = MIN_WEIGHTS,
        svd_rank: int = 0,
        activation_timesteps: Sequence[float] = (),
        format: int = FORMAT,
        quant_method: str = Method.PACKED,
    ) -> None:
        if format != FORMAT:
            raise UsageError(
                f"weights in packed format {format}; this version of diffalign reads {FORMAT}"
            )
        self.quant_method = Method(quant_method)
        self.bits, self.group_size, self.svd_rank = bits, group_size, svd_rank
        self.skip, self.min_weights = list(skip), min_weights
        self.activation_timesteps = list(activation_timesteps)
        self.format = format
        self.spec()

    def spec(self) -> PackSpec:
        """How each layer is packed."""
        steps = len(self.activation_timesteps)
        return PackSpec(self.bits, self.group_size, self.svd_rank, steps)

    def layers(self, model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
        """Those that it packs."""
        return packable(model, skip=self.skip, min_weights=self.min_weights)

    def make_layers(self, model: nn.Module) -> None:
        """Put empty packed layers, for a loader to fill, in the place of those that it packs."""
        for name, layer in self.layers(model).items():
            replace(model, name, packed_like(layer, self.spec()))
        if self.activation_timesteps:
            StepClock(self.activation_timesteps).attach(model)

    def keep(self, names: Sequence[str]) -> None:
        """Skip parts of names that a model's class wants in float32."""
        self.skip += [p for name in names for p in (name, f"*.{name}") if p not in self.skip]

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """What the mixin prints."""
        return self.to_dict()


class PackedTextConfig(
    PackedConfig, transformers.utils.quantization_config.QuantizationConfigMixin
):
    """The same for a text encoder."""


class PackedQuantizer(DiffusersQuantizer):
    """Packs each weight as it is read, or makes the layers that packed tensors are read into."""

    use_keep_in_fp32_modules = True
    quantization_config: PackedConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError(
                "packed weights cannot be offloaded to disk: leave it out of device_map"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.targets: dict[str, nn.Linear | nn.Conv2d] = {}
        if self.pre_quantized:
            config.make_layers(model)
        else:
            if config.activation_timesteps:
                raise UsageError(
                    "scales of activations are calibrated on a loaded model: use quantize_model"
                )
            config.keep(keep_in_fp32_modules)
            self.targets = config.layers(model)
        model.config.quantization_config = config  # type: ignore[union-attr]

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        name, _, kind = param_name.rpartition(".")
        return kind == "weight" and name in self.targets

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Of the weight as it is in the file: `param_value` is rounded to the model's dtype."""
        name = param_name.removesuffix(".weight")
        packed = packed_like(self.targets.pop(name), self.quantization_config.spec())
        packed.fill(state_dict[param_name].to(target_device), name=name)
        replace(model, name, packed)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """diffusers would warn and leave them on the meta device."""
        if self.pre_quantized and missing_keys:
            raise UsageError(
                f"{len(missing_keys)} tensors of the packed {type(model).__name__} are missing, for instance "
                f"{min(missing_keys)}: the folder is not complete or not of this model"
            )
        return missing_keys

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """By adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class PackedTextQuantizer(HfQuantizer):
    """Makes the layers that packed tensors are read into."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UsageError("a text encoder is packed after it is loaded: backends.quantize_model")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.quantization_config.make_layers(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Make the method known to diffusers and transformers, and a packed layer's size to the loader of FLUX LoRAs: it
    reads the size off the weight, would take a packed layer for a narrower one and replace it by a wider."""
    name = Method.PACKED.value
    auto.AUTO_QUANTIZER_MAPPING[name] = PackedQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = PackedConfig
    transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING[name] = PackedTextQuantizer
    transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = PackedTextConfig
    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(_module_shape)


_stock_module_shape = FluxLoraLoaderMixin._calculate_module_shape


def _module_shape(
    model: nn.Module, base_module: Any = None, base_weight_param_name: str | None = None
) -> Any:
    module = base_module
    if base_weight_param_name is not None:
        module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
    if isinstance(module, PackedLayer):
        return module.shape
    return _stock_module_shape(model, base_module, base_weight_param_name)


register()
