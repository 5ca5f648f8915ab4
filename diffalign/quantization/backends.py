"""Ways to make a model smaller, by name. Strings until one is used: listing loads neither torch nor diffusers.

`auto` takes `torchao-fp8` for a transformer on CUDA from compute capability 8.9, whose matrix units multiply float8,
and `torchao-int8` from 8.0, which multiply int8: both want `torch.compile`. Everything else gets `int8`:

- training, as no gradient passes through what rounds activations;
- U-Nets, because torchao leaves convolutions alone, two thirds of the weights of Stable Diffusion 1.5;
- CPUs, because uncompiled it is faster than `torchao-int8` there and errs half as much;
- text encoders, which run once an image and gain nothing by speed.

The `int8` and `int4` of this project run wherever torch does. They multiply unpacked weights: memory, not speed.
`int8-static` multiplies integers: speed on CPUs, for a model that has been calibrated on its few steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from diffalign.core.errors import UsageError
from diffalign.core.nearest import closest

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Backend:
    """A way to quantise, and what it needs."""

    description: str
    bits: int
    library: str = ""
    """That has to be installed; empty: none."""
    least: str = ""
    """Its oldest version that works."""
    capability: tuple[int, int] | None = None
    """The oldest CUDA device that works; None: any device, CPUs too."""
    settings: str = ""
    """Of torchao: the name of its configuration."""
    activations: bool = False
    """Inputs of linear layers are rounded, too, by scales that are calibrated before."""
    trains: bool = True
    """Gradients reach a layer's input, as those of adapters before it must. torchao 0.18 drops them where it rounds
    activations, without a word."""

    @property
    def is_packed(self) -> bool:
        return not self.library

    @property
    def takes_branch(self) -> bool:
        """A low-rank branch beside the weights: where those alone are rounded, in place."""
        return self.is_packed or (bool(self.settings) and self.trains)


_AO = ("torchao", "0.16")
BACKENDS = {
    "int8": Backend("8 bits in groups of 64, convolutions too", 8),
    "int4": Backend("4 bits in groups of 64, convolutions too; optional low-rank branch", 4),
    "int8-static": Backend(
        "8-bit weights, and activations of linear layers with scales calibrated for each step",
        8,
        activations=True,
        trains=False,
    ),
    "torchao-int8": Backend(
        "8-bit weights and activations",
        8,
        *_AO,
        settings="Int8DynamicActivationInt8WeightConfig",
        trains=False,
    ),
    "torchao-int8wo": Backend("8-bit weights", 8, *_AO, settings="Int8WeightOnlyConfig"),
    "torchao-fp8": Backend(
        "float8 weights and activations, a scale a row",
        8,
        *_AO,
        capability=(8, 9),
        settings="Float8DynamicActivationFloat8WeightConfig",
        trains=False,
    ),
    "torchao-fp8wo": Backend("float8 weights", 8, *_AO, settings="Float8WeightOnlyConfig"),
    "bnb-nf4": Backend("4-bit normal floats, while loading", 4, "bitsandbytes", "0.43.3", (0, 0)),
    "bnb-int8": Backend("LLM.int8, while loading", 8, "bitsandbytes", "0.43.3", (0, 0)),
}


def check_name(backend: str) -> None:
    """Raise UsageError with the nearest name where no backend has this one."""
    if backend != "auto" and backend not in BACKENDS:
        close = closest(backend, BACKENDS)
        hint = f"did you mean {close}?" if close else f"known are auto, {', '.join(BACKENDS)}"
        raise UsageError(f"no quantisation backend {backend!r}; {hint}")


def resolve(
    backend: str,
    *,
    device: torch.device | str,
    model: nn.Module | type | None = None,
    training: bool = False,
) -> str:
    """The name of a backend that works on a device.

    Args:
        backend: its name, or "auto".
        model: or its class, for which "auto" chooses.
        training: adapters will be trained over it.

    Raises:
        UsageError: there is none of that name, its library is missing or old, the device cannot run it, or no adapter
            can be trained over it.
    """
    if backend == "auto":
        return "int8" if training else _choose(device, model)
    check_name(backend)
    chosen = BACKENDS[backend]
    missing = _missing(chosen, device)
    if missing:
        raise UsageError(f"{backend} needs {missing}; int{chosen.bits} runs anywhere")
    if training and not chosen.trains:
        raise UsageError(
            f"no gradient passes through {backend}, which rounds activations: train over int8 or int4"
        )
    return backend


def missing_for(config: Mapping[str, Any], *, device: torch.device | str) -> str | None:
    """What a device lacks to run a saved model, in words; None: nothing that is known here.

    Args:
        config: the `quantization_config` of its config.json.
    """
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return _missing(BACKENDS["bnb-int8"], device)
    if config.get("quant_method") not in ("torchao", "diffalign_torchao"):
        return None
    # {"default": {"_type": NAME}}; older versions of torchao wrote a name of their own
    kind = config.get("quant_type")
    inner = kind.get("default") if isinstance(kind, Mapping) else None
    name = inner.get("_type") if isinstance(inner, Mapping) else None
    known = [b for b in BACKENDS.values() if name and b.settings == name]
    return _missing(known[0] if known else BACKENDS["torchao-int8wo"], device)


def _missing(backend: Backend, device: torch.device | str) -> str | None:
    """What a device lacks for a backend, in words."""
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
    """(-1, -1) where there is no CUDA."""
    import torch

    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return -1, -1
    return torch.cuda.get_device_capability(device)


def _describe(device: torch.device | str) -> str:
    capability = _capability(device)
    if capability < (0, 0):
        return f"no CUDA device ({device})"
    return f"one of {'.'.join(map(str, capability))}"
