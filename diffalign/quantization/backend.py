"""Interface of quantisation backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

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
