"""Quantisation backends by name.

Libraries are named by strings until a backend is used, so listing backends loads neither torch nor diffusers.

The backend `auto` is `torchao-fp8` for a transformer on CUDA from compute capability 8.9, which multiplies float8, and
`torchao-int8` from 8.0, which multiplies int8; both need `torch.compile` to be fast. Everything else gets `int8`:

- training, since no gradient passes through rounded activations;
- U-Nets, since torchao skips convolutions, two thirds of the weights of Stable Diffusion 1.5;
- CPUs, where uncompiled `int8` is faster than `torchao-int8` and has half its error;
- text encoders, which run once per image and gain nothing from speed.

The backends `int8`, `int4`, `int3` and `int2` of this project run wherever torch does. They multiply unpacked weights,
so they save memory, not time. The backend `int8-static` multiplies integers: it is fast on CPUs, for a model that is
calibrated on its few steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.core.errors import UsageError
from diffalign.core.nearest import nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffalign.quantization.layers import PackSpec
    from diffalign.quantization.moments import Moments
    from diffalign.quantization.observer import ActivationScales


@dataclass(frozen=True)
class Work:
    """Settings with which a backend quantises one loaded model.

    Attributes:
        spec: settings of packed weights.
        skip: layers that are not quantised, as in `packed.packable`.
        min_weights: size below which layers are not quantised.
        input_scales: result of `lowrank.collect_input_scales`, for a low-rank branch.
        activations: result of `observer.InputObserver`, for rounded activations.
        moments: result of `moments.collect_moments`, for codes by GPTQ; None for the nearest codes.
        bits: bits of every packed layer by name, for the backend "mixed".
    """

    spec: PackSpec
    skip: Sequence[str]
    min_weights: int
    input_scales: Mapping[str, Tensor] | None = None
    activations: ActivationScales | None = None
    moments: Iterable[Mapping[str, Moments]] | None = None
    bits: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Backend(ABC):
    """Quantisation method and its requirements."""

    description: str
    bits: int
    capability: tuple[int, int] | None = None
    """Least compute capability of a CUDA device; None for any device, CPUs included."""
    activations: bool = False
    """True if inputs of linear layers are rounded, too, with scales calibrated in advance."""
    trains: bool = True
    """True if gradients reach a layer's input, as adapters in earlier layers need.

    Without a warning, torchao 0.18 drops these gradients where it rounds activations.
    """
    token_scales: bool = False
    """True if linear layers round inputs by token, with scales of each forward."""
    by_layer: bool = False
    """True if each layer has its own number of bits."""
    library: ClassVar[str] = ""
    """Library that must be installed; empty if none."""
    least: ClassVar[str] = ""
    """Oldest version of the library that works."""
    is_packed: ClassVar[bool] = False
    """True for this project's own formats, which have every option."""
    quantises_loaded: ClassVar[bool] = True
    """True if a loaded model can be quantised, False if only during loading."""

    @property
    def takes_branch(self) -> bool:
        """True if a loaded model's weights can have a low-rank branch."""
        return False

    @property
    def is_for_compile(self) -> bool:
        """True if forwards are fast only with torch.compile."""
        return False

    @abstractmethod
    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        """Return diffusers' configuration that quantises a denoiser while it loads."""

    @abstractmethod
    def quantize(self, model: Any, work: Work) -> Any:
        """Quantise a loaded model in place, and return the configuration that reloads it."""


class Packed(Backend):
    """Integers that this project packs, for linear layers and convolutions."""

    is_packed = True

    @property
    def takes_branch(self) -> bool:
        return True

    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        from diffalign.quantization.quantizer import PackedConfig

        return PackedConfig(
            spec.bits,
            spec.group_size,
            skip,
            svd_rank=spec.svd_rank,
            token_scales=spec.token_scales,
        )

    def quantize(self, model: Any, work: Work) -> Any:
        import diffusers
        import torch

        from diffalign.quantization.packed import pack_model
        from diffalign.quantization.quantizer import PackedConfig, PackedTextConfig

        spec = work.spec
        is_denoiser = isinstance(model, diffusers.ModelMixin)
        kind = PackedConfig if is_denoiser else PackedTextConfig
        bits = spec.bits if work.bits is None else work.bits
        config = kind(
            bits,
            spec.group_size,
            work.skip,
            work.min_weights,
            spec.svd_rank,
            token_scales=spec.token_scales,
        )
        # The float32 layers of a T5 overflow in float16 only.
        if is_denoiser or model.dtype == torch.float16:
            config.keep(model._keep_in_fp32_modules or ())
        if work.activations is not None:
            config.activation_timesteps = list(work.activations.timesteps)
        pack_model(
            model,
            spec=spec,
            skip=config.skip,
            min_weights=work.min_weights,
            input_scales=work.input_scales,
            activations=work.activations,
            moments=work.moments,
            bits=work.bits,
        )
        return config


@dataclass(frozen=True)
class TorchAO(Backend):
    """Weights of torchao, for linear layers."""

    settings: str = ""
    """Name of torchao's configuration class."""
    library = "torchao"
    least = "0.16"

    @property
    def takes_branch(self) -> bool:
        # the branch is beside weights in 8 bits whose inputs are not rounded
        return self.trains

    @property
    def is_for_compile(self) -> bool:
        return not self.trains

    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        import diffusers
        from torchao.quantization import FqnToConfig

        # Full names are needed: "proj_out" in `modules_to_not_convert` would also match that of each FLUX block.
        skipped = {f"re:{p.replace('.', '[.]').replace('*', '.*')}([.].*)?": None for p in skip}
        return diffusers.TorchAoConfig(FqnToConfig({**skipped, "_default": self._library_config()}))

    def quantize(self, model: Any, work: Work) -> Any:
        import diffusers
        import transformers
        from torch import nn
        from torchao.quantization import quantize_

        from diffalign.quantization.branches import BranchConfig
        from diffalign.quantization.packed import packable

        names = set(packable(model, skip=work.skip, min_weights=work.min_weights))
        settings, rank = self._library_config(), work.spec.svd_rank
        library = diffusers if isinstance(model, diffusers.ModelMixin) else transformers
        config = library.TorchAoConfig(settings)
        if rank:
            config = BranchConfig(settings, None, rank, work.skip, work.min_weights)
            config.split(model, work.input_scales)
        quantize_(
            model, settings, filter_fn=lambda m, name: name in names and isinstance(m, nn.Linear)
        )
        return config

    def _library_config(self) -> Any:
        """Return torchao's configuration."""
        settings = getattr(import_module("torchao.quantization"), self.settings)
        if self.capability is None:
            return settings()
        from torchao.quantization import PerRow

        return settings(granularity=PerRow())


class BitsAndBytes(Backend):
    """Weights of bitsandbytes, which quantises a model only while it loads."""

    library = "bitsandbytes"
    least = "0.43.3"
    quantises_loaded = False

    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        import diffusers
        import torch

        if self.bits == 8:
            return diffusers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(skip),
        )

    def quantize(self, model: Any, work: Work) -> Any:
        raise NotImplementedError("bitsandbytes quantises a model while it loads")


BACKENDS: dict[str, Backend] = {
    "int8": Packed("8 bits in groups of 64, convolutions too", 8),
    "int4": Packed("4 bits in groups of 64, convolutions too; optional low-rank branch", 4),
    "int3": Packed("3 bits in groups of 64, convolutions too; made for GPTQ", 3),
    "int2": Packed("2 bits in groups of 64, convolutions too; by GPTQ only", 2),
    "mixed": Packed("2 to 8 bits by layer, for a given mean; by GPTQ only", 4, by_layer=True),
    "int8-static": Packed(
        "8-bit weights, and activations of linear layers with scales calibrated for each step",
        8,
        activations=True,
        trains=False,
    ),
    "int8-dynamic": Packed(
        "8-bit weights and activations of linear layers, a scale for each token",
        8,
        token_scales=True,
        trains=False,
    ),
    "int4a8": Packed(
        "4-bit weights, one scale per row, by 8-bit activations, a scale for each token",
        4,
        token_scales=True,
        trains=False,
    ),
    "torchao-int8": TorchAO(
        "8-bit weights and activations",
        8,
        settings="Int8DynamicActivationInt8WeightConfig",
        trains=False,
    ),
    "torchao-int8wo": TorchAO("8-bit weights", 8, settings="Int8WeightOnlyConfig"),
    "torchao-fp8": TorchAO(
        "float8 weights and activations, one scale per row",
        8,
        capability=(8, 9),
        settings="Float8DynamicActivationFloat8WeightConfig",
        trains=False,
    ),
    "torchao-fp8wo": TorchAO("float8 weights", 8, settings="Float8WeightOnlyConfig"),
    "bnb-nf4": BitsAndBytes("4-bit normal floats, while loading", 4, (0, 0)),
    "bnb-int8": BitsAndBytes("LLM.int8, while loading", 8, (0, 0)),
}


def check_name(backend: str) -> None:
    """Raise UsageError with the nearest name if there is no backend of this name."""
    if backend != "auto" and backend not in BACKENDS:
        hint = nearest(backend, BACKENDS, otherwise=f"choose from auto, {', '.join(BACKENDS)}")
        raise UsageError(f"no quantisation backend is named {backend!r}{hint}")


def resolve(
    backend: str,
    *,
    device: torch.device | str,
    model: nn.Module | type | None = None,
    training: bool = False,
) -> str:
    """Return the name of a backend that works on a device.

    Args:
        backend: name of a backend, or "auto".
        device: device on which the model will run.
        model: model or its class, for "auto".
        training: whether adapters will be trained over the model.

    Raises:
        UsageError: the name is unknown, the library is missing or too old, the device cannot run the backend, or no
            adapter can be trained over it.
    """
    if backend == "auto":
        return "int8" if training else _choose(device, model)
    check_name(backend)
    method = BACKENDS[backend]
    missing = _missing(method, device)
    if missing:
        raise UsageError(f"backend={backend} needs {missing}. `int{method.bits}` works without it.")
    if training and not method.trains:
        raise UsageError(
            f"backend={backend}: no gradient passes through rounded activations. Train over int8 or int4."
        )
    return backend


def missing_for(config: Mapping[str, Any], *, device: torch.device | str) -> str | None:
    """Describe what a device lacks to run a saved model; None if nothing is missing.

    Only libraries and compute capability are checked.

    Args:
        config: the `quantization_config` of the model's config.json.
        device: device on which the model will run.
    """
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return _missing(BACKENDS["bnb-int8"], device)
    if config.get("quant_method") not in ("torchao", "diffalign_torchao"):
        return None
    # The type is {"default": {"_type": NAME}}. Older versions of torchao wrote other names.
    kind = config.get("quant_type")
    inner = kind.get("default") if isinstance(kind, Mapping) else None
    name = inner.get("_type") if isinstance(inner, Mapping) else None
    backends = [b for b in BACKENDS.values() if isinstance(b, TorchAO) and b.settings == name]
    return _missing(backends[0] if backends else BACKENDS["torchao-int8wo"], device)


def _missing(backend: Backend, device: torch.device | str) -> str | None:
    """Describe what a device lacks for a backend; None if nothing is missing."""
    if backend.library and _version(backend.library) < _numbers(backend.least):
        needed = f"{backend.library}>={backend.least}"
        return f"{needed}: pip install '{needed}'"
    if backend.capability and _capability(device) < backend.capability:
        needed = ".".join(map(str, backend.capability))
        kind = f"a CUDA device of compute capability {needed}"
        return f"{kind if any(backend.capability) else 'CUDA'}, this is {_describe(device)}"
    return None


def _choose(device: torch.device | str, model: nn.Module | type | None) -> str:
    from diffusers import ModelMixin, UNet2DConditionModel

    kind = model if isinstance(model, type) else type(model)
    linear = issubclass(kind, ModelMixin) and not issubclass(kind, UNet2DConditionModel)
    if not linear or _version("torchao") < _numbers(BACKENDS["torchao-int8"].least):
        return "int8"
    capability = _capability(device)
    if capability >= (8, 9):
        return "torchao-fp8"
    return "torchao-int8" if capability >= (8, 0) else "int8"


def _version(library: str) -> tuple[int, ...]:
    try:
        return _numbers(metadata.version(library))
    except metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _capability(device: torch.device | str) -> tuple[int, int]:
    """Return the compute capability of a device, (-1, -1) without CUDA."""
    import torch

    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return -1, -1
    return torch.cuda.get_device_capability(device)


def _describe(device: torch.device | str) -> str:
    capability = _capability(device)
    if capability < (0, 0):
        return f"no CUDA device ({device})"
    return f"one of {'.'.join(map(str, capability))}"
