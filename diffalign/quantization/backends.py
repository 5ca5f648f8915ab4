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

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from diffalign.core.errors import UsageError
from diffalign.core.nearest import nearest
from diffalign.quantization.backend import Backend, Work
from diffalign.quantization.libraries import BitsAndBytes, Gguf, Quanto, Sdnq, TorchAO

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diffalign.quantization.layers import PackSpec

MX = "torchao.prototype.mx_formats"


class Packed(Backend):
    """Integers that this project packs, for linear layers and convolutions."""

    is_packed = True

    @property
    def takes_branch(self) -> bool:
        return True

    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        from diffalign.quantization.quantizer import TOKEN, PackedConfig

        return PackedConfig(
            spec.bits,
            spec.group_size,
            skip,
            svd_rank=spec.svd_rank,
            activation_timesteps=TOKEN if spec.token_scales else (),
        )

    def quantize(self, model: Any, work: Work) -> Any:
        import diffusers
        import torch

        from diffalign.quantization.packed import pack_model
        from diffalign.quantization.quantizer import TOKEN, PackedConfig, PackedTextConfig

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
            activation_timesteps=TOKEN if spec.token_scales else (),
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
        by_row=True,
        settings="Float8DynamicActivationFloat8WeightConfig",
        trains=False,
    ),
    "torchao-fp8wo": TorchAO("float8 weights", 8, settings="Float8WeightOnlyConfig"),
    "torchao-mxfp8": TorchAO(
        "float8 weights and activations in blocks of 32 (prototype of torchao)",
        8,
        capability=(10, 0),
        settings="MXDynamicActivationMXWeightConfig",
        module=MX,
        trains=False,
    ),
    "torchao-nvfp4": TorchAO(
        "4-bit floats, weights and activations, in blocks of 16 (prototype of torchao)",
        4,
        capability=(10, 0),
        settings="NVFP4DynamicActivationNVFP4WeightConfig",
        module=MX,
        trains=False,
    ),
    "bnb-nf4": BitsAndBytes("4-bit normal floats, while loading", 4, (0, 0)),
    "bnb-int8": BitsAndBytes("LLM.int8, while loading", 8, (0, 0)),
    "quanto-int8": Quanto("8-bit weights, while loading", 8, weights_dtype="int8"),
    "quanto-int4": Quanto("4-bit weights, while loading", 4, weights_dtype="int4"),
    "sdnq-int8": Sdnq("8-bit weights, convolutions too, while loading", 8, weights_dtype="int8"),
    "sdnq-uint4": Sdnq(
        "4-bit weights with zero points, convolutions too, while loading", 4, weights_dtype="uint4"
    ),
    "gguf": Gguf("files of llama.cpp's format, which diffusers reads and nothing here writes", 4),
}
LOADERS = {"quanto": "quanto-int8", "sdnq": "sdnq-int8", "gguf": "gguf"}
"""Backends by the name of their method in a saved configuration."""


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
    method = config.get("quant_method")
    if method in LOADERS:
        return _missing(BACKENDS[LOADERS[method]], device)
    if method not in ("torchao", "diffalign_torchao"):
        return None
    # The type is {"default": {"_type": NAME}}. Older versions of torchao wrote other names.
    kind = config.get("quant_type")
    inner = kind.get("default") if isinstance(kind, Mapping) else None
    name = inner.get("_type") if isinstance(inner, Mapping) else None
    backends = [b for b in BACKENDS.values() if isinstance(b, TorchAO) and b.settings == name]
    return _missing(backends[0] if backends else BACKENDS["torchao-int8wo"], device)


def missing_on(backend: str, device: torch.device | str) -> str | None:
    """Describe what a device lacks for a backend; None if it lacks nothing."""
    return _missing(BACKENDS[backend], device)


def missing_library(library: str, least: str) -> str | None:
    """Describe how to install a library; None if this version is installed."""
    if _version(library) >= _numbers(least):
        return None
    return f"{library}>={least}: pip install '{library}>={least}'"


def _missing(backend: Backend, device: torch.device | str) -> str | None:
    """Describe what a device lacks for a backend; None if nothing is missing."""
    if backend.library and (needed := missing_library(backend.library, backend.least)):
        return needed
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
