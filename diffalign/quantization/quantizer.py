"""Packed weights as a quantisation method of diffusers and transformers.

A saved folder loads with stock classes. Importing this module registers the method and that of `branches`; a stock
program that loads such a folder needs that one import. Diffusers' loader of FLUX LoRAs is patched once a packed model
exists. Without it diffusers says "Unknown quantization type, got
diffalign_packed". Denoisers can be packed while they load (`from_pretrained(...,
quantization_config=PackedConfig())`), text encoders only in place (`apply.quantize_model`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from diffalign.quantization.packed import (
    MIN_WEIGHTS,
    SKIP,
    Specs,
    check_rounding,
    packable,
    replace,
)

TOKEN = "token"
"""Value of `activation_timesteps` for a scale for each row of an input."""
FORMATS = (1, 2)
"""Versions of the saved format: 1 for codes of 8 and 4 bits, 2 for all others.

Releases that write format 1 only read it, and refuse format 2 by its number.
"""


class Method(StrEnum):
    """Name of the quantisation method; an enumeration, because diffusers reads its `value`."""

    PACKED = "diffalign_packed"


class PackedConfig(QuantizationConfigMixin):
    """Settings of a packed model: the argument of `from_pretrained`, saved in config.json.

    Args:
        bits: 8, 4, 3 or 2; or the bits of every packed layer, by its full name.
        group_size: weights that share a scale; None for a whole row.
        skip: layers that keep their weights, as in `packed.packable`.
        min_weights: size below which layers keep their weights.
        svd_rank: rank of SVDQuant's low-rank branch; 0 for none.
        activation_timesteps: timesteps, in the denoiser's units, for which the inputs of linear layers have scales;
            empty for inputs in 16 bits. "token" if each row of an input has a scale of its own.
        format: version of the saved format; None for the one that these settings need.
        quant_method: name of the method.

    Raises:
        UsageError: a value is out of range, or the folder has a later format.
    """

    def __init__(
        self,
        bits: int | Mapping[str, int] = 4,
        group_size: int | None = 64,
        skip: Sequence[str] = SKIP,
        min_weights: int = MIN_WEIGHTS,
        svd_rank: int = 0,
        activation_timesteps: Sequence[float] | str = (),
        format: int | None = None,
        quant_method: str = Method.PACKED,
    ) -> None:
        if format is not None and format not in FORMATS:
            raise UsageError(
                f"weights are in packed format {format}; this version of diffalign reads up to {FORMATS[-1]}. Update "
                "diffalign."
            )
        self.quant_method = Method(quant_method)
        self.bits = dict(bits) if isinstance(bits, Mapping) else bits
        self.group_size, self.svd_rank = group_size, svd_rank
        self.skip, self.min_weights = list(skip), min_weights
        by_token = activation_timesteps == TOKEN
        steps = () if isinstance(activation_timesteps, str) else activation_timesteps
        self.activation_timesteps: list[float] | str = TOKEN if by_token else list(steps)
        self.specs()
        self.format = format or (1 if bits in (4, 8) and not by_token else 2)

    def specs(self) -> Specs:
        """Return the settings of each packed layer."""
        by_token = self.activation_timesteps == TOKEN
        steps = 0 if by_token else len(self.activation_timesteps)
        own = (self.group_size, self.svd_rank, steps, by_token)
        if isinstance(self.bits, int):
            return Specs(PackSpec(self.bits, *own))
        # every number of bits is checked
        specs = [PackSpec(bits, *own) for bits in self.bits.values()]
        return Specs(specs[0] if specs else PackSpec(), self.bits)

    def layers(self, model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the layers to pack, by name."""
        return packable(model, skip=self.skip, min_weights=self.min_weights)

    def make_layers(self, model: nn.Module) -> None:
        """Replace the layers to pack by empty packed layers, which a loader fills."""
        for name, layer in self.layers(model).items():
            replace(model, name, packed_like(layer, self.specs().of(name)))
        if isinstance(self.activation_timesteps, list) and self.activation_timesteps:
            StepClock(self.activation_timesteps).attach(model)

    def keep(self, names: Sequence[str]) -> None:
        """Add layers that a model's class keeps in float32 to `skip`."""
        self.skip += [p for name in names for p in (name, f"*.{name}") if p not in self.skip]

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all settings, which the mixin prints."""
        return self.to_dict()


class PackedTextConfig(
    PackedConfig, transformers.utils.quantization_config.QuantizationConfigMixin
):
    """Settings of a packed text encoder, for transformers."""


class PackedQuantizer(DiffusersQuantizer):
    """Quantizer of denoisers for diffusers.

    It packs each weight while it loads, or creates the layers into which packed tensors are loaded.
    """

    use_keep_in_fp32_modules = True
    quantization_config: PackedConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        # diffusers calls this for every packed model, before its weights are read
        patch_flux_loader()
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError(
                "device_map: packed weights cannot be offloaded to disk. Remove 'disk' from device_map."
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.targets: dict[str, nn.Linear | nn.Conv2d] = {}
        if self.pre_quantized:
            config.make_layers(model)
        else:
            if config.activation_timesteps and config.activation_timesteps != TOKEN:
                raise UsageError(
                    "activation_timesteps: scales of activations need a loaded model. Use quantize_model."
                )
            if isinstance(config.bits, dict):
                raise UsageError("bits: bits by layer need a loaded model. Use quantize_model.")
            check_rounding(config.bits, calibrated=False)
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
        """Pack the weight of the file, since `param_value` is rounded to the model's dtype."""
        name = param_name.removesuffix(".weight")
        packed = packed_like(self.targets.pop(name), self.quantization_config.specs().of(name))
        packed.fill(state_dict[param_name].to(target_device), name=name)
        replace(model, name, packed)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Raise UsageError for missing tensors, which diffusers would leave on the meta device."""
        if self.pre_quantized and missing_keys:
            raise UsageError(
                f"{len(missing_keys)} tensors of the packed {type(model).__name__} are missing, for instance "
                f"{min(missing_keys)}: the folder is incomplete or of another model. Save the model again."
            )
        return missing_keys

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained on packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class PackedTextQuantizer(HfQuantizer):
    """Quantizer of text encoders for transformers, which creates the layers to load into."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UsageError(
                f"quant_method={Method.PACKED.value}: a text encoder cannot be packed while it loads. Load it and use "
                "apply.quantize_model."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.quantization_config.make_layers(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Register the method with diffusers and transformers."""
    name = Method.PACKED.value
    auto.AUTO_QUANTIZER_MAPPING[name] = PackedQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = PackedConfig
    transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING[name] = PackedTextQuantizer
    transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = PackedTextConfig


def patch_flux_loader() -> None:
    """Let diffusers' loader of FLUX LoRAs see the real sizes of packed layers.

    The loader reads a layer's size from its weight. It would take a packed layer for a narrower one and replace it by
    a wider one.
    """
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
