"""Settings of a quantisation, and quantisation of a model with what its calibration measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt
from diffalign.evaluation.likeness import psnr
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import load_model
from diffalign.quantization import svdquant
from diffalign.quantization.apply import quantization_config, quantize_pipeline
from diffalign.quantization.backends import BACKENDS, resolve
from diffalign.quantization.moments import MEMORY
from diffalign.quantization.packed import check_rounding, packable
from diffalign.tuning.allocation import choose_bits
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.scales import STEPS, ScaleTuning, Trajectories, tune_scales

GIB = 2**30
LAYOUTS = {"diffalign": None, "svdquant-int4": "int4", "svdquant-nvfp4": "nvfp4"}
"""Layouts of a saved denoiser, with SVDQuant's precision (`svdquant.export_pipeline`)."""
IMAGES = 16
"""Images of the calibration prompts that are compared before and after."""


@dataclass(frozen=True)
class SmallerSettings:
    """Settings of a quantisation.

    Attributes:
        backend: name of a backend, or "auto".
        components: parts that are quantised besides the denoiser.
        group_size: weights that share a scale.
        svd_rank: rank of the low-rank branch; 0 for none.
        latency: images of the timed forward; 0 skips the timing.
        rounding: "gptq", "nearest", or None for GPTQ of packed weights where there are calibration prompts.
        calibration_memory: GiB of second moments that are held at once. The prompts are sampled again for what does not
            fit.
        tune_steps: updates of the scales of packed weights; None for 60 at 2 bits and none otherwise.
        bits_per_weight: largest mean of the bits of packed weights, for bits by layer; None for one number of bits.
        layout: name in `LAYOUTS` of the saved denoiser's layout.
    """

    backend: str = "auto"
    components: Sequence[str] = ()
    group_size: int = 64
    svd_rank: int = 0
    latency: int = 1
    rounding: str | None = None
    calibration_memory: float = MEMORY / GIB
    tune_steps: int | None = None
    bits_per_weight: float | None = None
    layout: str = "diffalign"

    def check(self, prompts: Sequence[Prompt] | None) -> None:
        """Raise UsageError if the settings do not fit together or to the calibration prompts."""
        if self.latency < 0:
            raise UsageError(
                f"latency={self.latency} must not be negative. Set 0 to skip the timing."
            )
        if (self.bits_per_weight is not None) != (self.method == "mixed"):
            raise UsageError(
                f"backend={self.backend}: bits_per_weight belongs to mixed alone. Set both, or neither."
            )
        self._check_layout(prompts)
        # "auto" is known when the model is loaded
        backend = BACKENDS.get(self.method)
        if not prompts:
            self._check_uncalibrated()
        if backend is not None and backend.is_packed:
            check_rounding(backend.bits, calibrated=bool(prompts) and self.gptq(self.method))
        if prompts and backend is not None:
            self.check_calibration(self.method)

    @property
    def precision(self) -> str | None:
        """Precision of SVDQuant's layout; None for the own layout."""
        return LAYOUTS[self.layout]

    def _check_layout(self, prompts: Sequence[Prompt] | None) -> None:
        """Raise UsageError if SVDQuant's layout cannot be made with the settings."""
        if self.precision is None:
            return
        if self.components:
            raise UsageError(
                f"components={' '.join(self.components)}: layout={self.layout} is for denoisers alone, and stock "
                "diffusers reads no other part of ours. Omit `components`."
            )
        if self.svd_rank % svdquant.RANK or self.svd_rank < svdquant.RANK:
            raise UsageError(
                f"svd_rank={self.svd_rank}: the kernels of layout={self.layout} take multiples of {svdquant.RANK}. "
                "Set `svd_rank` to 32."
            )
        if self.precision == "nvfp4" and (self.backend != "auto" or prompts):
            raise UsageError(
                f"layout={self.layout}: its numbers are made from the original weights, without calibration. Omit "
                "`backend` and `prompts`."
            )
        group_size = svdquant.GROUPS["int4"]
        if self.precision == "int4" and (self.backend, self.group_size) != ("int4", group_size):
            raise UsageError(
                f"layout={self.layout}: its weights are those of int4 in groups of {group_size}. Set `backend` to "
                f"int4 and `group_size` to {group_size}."
            )

    @property
    def method(self) -> str:
        """Name of the backend; "mixed" for "auto" with bits by layer."""
        is_mixed = self.backend == "auto" and self.bits_per_weight is not None
        return "mixed" if is_mixed else self.backend

    def _check_uncalibrated(self) -> None:
        """Raise UsageError for settings that need calibration prompts."""
        calibrated = {
            f"backend={self.backend}": self.backend in BACKENDS
            and BACKENDS[self.backend].activations,
            "rounding=gptq": self.rounding == "gptq",
            f"bits_per_weight={self.bits_per_weight}": self.bits_per_weight is not None,
            f"tune_steps={self.tune_steps}": self.tune_steps,
        }
        for setting, is_set in calibrated.items():
            if is_set:
                raise UsageError(
                    f"{setting} needs calibration images. Give `prompts` to sample them from."
                )

    def check_calibration(self, backend: str) -> None:
        """Raise UsageError if a backend has no use for the calibration prompts."""
        packed = BACKENDS[backend].is_packed
        if self.rounding == "gptq" and not packed:
            raise UsageError(
                f"rounding=gptq: backend={backend} rounds to nearest. Use a packed backend, such as int4."
            )
        if self.tune_steps and not packed:
            raise UsageError(
                f"tune_steps={self.tune_steps}: backend={backend} has no scales to tune. Use a packed backend, such as "
                "int2."
            )
        if BACKENDS[backend].by_layer and self.rounding == "nearest":
            raise UsageError("rounding=nearest: backend=mixed rounds by GPTQ. Omit rounding.")
        by_prompts = self.gptq(backend) or self.svd_rank or self.tune_steps
        if not (by_prompts or BACKENDS[backend].activations):
            raise UsageError(
                f"prompts: backend={backend} with these settings is not calibrated. Use a packed backend with "
                "rounding=gptq, set `svd_rank`, or omit `prompts`."
            )

    def gptq(self, backend: str) -> bool:
        """Return whether GPTQ rounds the weights of a backend, if there are calibration prompts."""
        return BACKENDS[backend].is_packed and self.rounding != "nearest"

    def updates(self, backend: str) -> int:
        """Return the updates of a backend's scales, if there are calibration prompts."""
        if self.tune_steps is not None:
            return self.tune_steps
        return STEPS if BACKENDS[backend].is_packed and BACKENDS[backend].bits == 2 else 0


@dataclass(frozen=True)
class Quantised:
    """Quantised model, and what was done to it.

    Attributes:
        model: the quantised model.
        backends: backend of each part.
        tuning: result of tuning the scales; None without.
        bits: bits of every layer of the denoiser; None if all have the same.
        psnr: mean PSNR in dB of images of calibration prompts to those before; None without such prompts.
    """

    model: TextToImageModel
    backends: dict[str, str]
    tuning: ScaleTuning | None = None
    bits: dict[str, int] | None = None
    psnr: float | None = None


def quantise(
    model: TextToImageModel,
    source: str,
    settings: SmallerSettings,
    *,
    dtype: torch.dtype,
    calibration: Calibration | None = None,
) -> Quantised:
    """Quantise in place if the backend can, else by loading the model again.

    Args:
        model: the model.
        source: name or folder from which the model was loaded.
        settings: settings of the quantisation.
        dtype: dtype of the parts that are not quantised.
        calibration: prompts to calibrate `model` on; None without.

    Raises:
        UsageError: the backend cannot quantise this model with these settings.
    """
    name = resolve(settings.method, device=model.device, model=model.denoiser)
    if calibration is not None:
        settings.check_calibration(name)
    if BACKENDS[name].quantises_loaded:
        return _in_place(model, name, settings, calibration)
    if settings.components:
        raise UsageError(
            f"components: {name} quantises only the denoiser, while it loads. Use another backend for components."
        )
    config = quantization_config(
        name, device=model.device, group_size=settings.group_size, svd_rank=settings.svd_rank
    )
    mapping = PipelineQuantizationConfig(quant_mapping={model.denoiser_part: config})
    again = load_model(source, dtype=dtype, device=model.device, quantization_config=mapping)
    return Quantised(again, {model.denoiser_part: name})


def _in_place(
    model: TextToImageModel, name: str, settings: SmallerSettings, calibration: Calibration | None
) -> Quantised:
    """Quantise a loaded model."""
    backend, pipeline, steps = BACKENDS[name], model.pipeline, settings.updates(name)
    options: dict[str, Any] = {"group_size": settings.group_size, "svd_rank": settings.svd_rank}
    trajectories = images = None
    if calibration is not None:
        images = calibration.images(IMAGES)
        if steps or backend.by_layer:
            trajectories = Trajectories.record(calibration)
        if backend.activations:
            options["activations"] = calibration.activation_scales()
        if settings.gptq(name):
            memory = int(settings.calibration_memory * GIB)
            options["moments"] = calibration.moments(memory=memory)
            if settings.bits_per_weight is not None and trajectories is not None:
                options["bits"] = choose_bits(
                    packable(model.denoiser),
                    calibration.moments(memory=memory),
                    trajectories,
                    bits_per_weight=settings.bits_per_weight,
                    group_size=settings.group_size,
                )
        elif settings.svd_rank:
            options["input_scales"] = calibration.input_scales()
    done = quantize_pipeline(pipeline, name, **options)
    tuning = tune_scales(trajectories, steps=steps) if trajectories and steps else None
    if settings.components:
        # text encoders have neither timesteps nor calibration, which few bits need
        is_fine = backend.bits >= 4 and not backend.by_layer
        other = "int8" if backend.is_packed and not backend.trains else name if is_fine else "int4"
        components, size = settings.components, settings.group_size
        done |= quantize_pipeline(pipeline, other, components=components, group_size=size)
    likeness = None
    if calibration is not None and images is not None:
        likeness = psnr(calibration.images(IMAGES), images)
    return Quantised(model, done, tuning, options.get("bits"), likeness)
