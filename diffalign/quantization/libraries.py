"""Backends of other libraries, as diffusers reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffalign.core.errors import UsageError
from diffalign.quantization.backend import Backend, Work

if TYPE_CHECKING:
    from diffalign.quantization.layers import PackSpec


@dataclass(frozen=True)
class TorchAO(Backend):
    """Weights of torchao, for linear layers."""

    settings: str = ""
    """Name of torchao's configuration class."""
    module: str = "torchao.quantization"
    """Module of the configuration class."""
    by_row: bool = False
    """True if the configuration gets one scale for each row."""
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
        settings = getattr(import_module(self.module), self.settings)
        if not self.by_row:
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


@dataclass(frozen=True)
class WhileLoading(Backend):
    """Backend that quantises a model only while it loads, by a configuration class of diffusers."""

    weights_dtype: str = ""
    """Name of the weights' format in the library."""
    quantises_loaded = False

    def quantize(self, model: Any, work: Work) -> Any:
        raise NotImplementedError(f"{self.library} quantises a model while it loads")


class Quanto(WhileLoading):
    """Weights of optimum-quanto, for linear layers. diffusers 1.0 will not read them any more."""

    library = "optimum-quanto"
    least = "0.2.6"

    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        import diffusers

        return diffusers.QuantoConfig(self.weights_dtype, modules_to_not_convert=list(skip))


class Sdnq(WhileLoading):
    """Weights of SDNQ, for linear layers and convolutions."""

    library = "sdnq"
    least = "0.2.2"

    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        import diffusers

        return diffusers.SDNQConfig(
            weights_dtype=self.weights_dtype, quant_conv=True, modules_to_not_convert=list(skip)
        )


class Gguf(WhileLoading):
    """Weights of llama.cpp's format, which other programs write and diffusers reads from single files."""

    library = "gguf"
    least = "0.10"

    def config(self, spec: PackSpec, skip: Sequence[str]) -> Any:
        raise UsageError(
            "backend=gguf: files of this format are written by other programs. Load one with diffusers' "
            "from_single_file(..., quantization_config=GGUFQuantizationConfig()), or use int4."
        )
