"""Quantise and save a copy of a model, and measure its size and speed."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from diffalign.core.errors import UsageError
from diffalign.core.files import folder_aside
from diffalign.core.versions import versions
from diffalign.data.prompts import Prompt
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import card_of
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.saving import save_pipeline
from diffalign.quantization.accounting import ModuleReport, folder_bytes, report
from diffalign.quantization.apply import quantization_config, quantize_pipeline
from diffalign.quantization.backends import BACKENDS, resolve
from diffalign.quantization.latency import Comparison, forward_seconds
from diffalign.quantization.moments import MEMORY
from diffalign.quantization.packed import check_rounding
from diffalign.tuning.calibration import Calibration

logger = logging.getLogger(__name__)
REPORT = "quantization.json"
GIB = 2**30


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
    """

    backend: str = "auto"
    components: Sequence[str] = ()
    group_size: int = 64
    svd_rank: int = 0
    latency: int = 1
    rounding: str | None = None
    calibration_memory: float = MEMORY / GIB

    def check(self, prompts: Sequence[Prompt] | None) -> None:
        """Raise UsageError if the settings do not fit together or to the calibration prompts."""
        if self.latency < 0:
            raise UsageError(
                f"latency={self.latency} must not be negative. Set 0 to skip the timing."
            )
        # "auto" is known when the model is loaded
        backend = BACKENDS.get(self.backend)
        static = backend is not None and backend.activations
        if static and not prompts:
            raise UsageError(
                f"backend={self.backend} needs calibration images. Give `prompts` to sample them from."
            )
        if self.rounding == "gptq" and not prompts:
            raise UsageError(
                "rounding=gptq needs calibration images. Give `prompts` to sample them from."
            )
        if backend is not None and backend.is_packed:
            check_rounding(backend.bits, calibrated=bool(prompts) and self.gptq(self.backend))
        if prompts and backend is not None:
            self.check_calibration(self.backend)

    def check_calibration(self, backend: str) -> None:
        """Raise UsageError if a backend has no use for the calibration prompts."""
        packed = BACKENDS[backend].is_packed
        if self.rounding == "gptq" and not packed:
            raise UsageError(
                f"rounding=gptq: backend={backend} rounds to nearest. Use a packed backend, such as int4."
            )
        if not (
            (packed and self.rounding != "nearest")
            or self.svd_rank
            or BACKENDS[backend].activations
        ):
            raise UsageError(
                f"prompts: backend={backend} with these settings is not calibrated. Use a packed backend with "
                "rounding=gptq, set `svd_rank`, or omit `prompts`."
            )

    def gptq(self, backend: str) -> bool:
        """Return whether GPTQ rounds the weights of a backend, if there are calibration prompts."""
        return BACKENDS[backend].is_packed and self.rounding != "nearest"


@dataclass(frozen=True)
class Smaller:
    """Quantised model: folder of its denoiser, its size and speed, and the result as JSON."""

    part: str
    weights: ModuleReport
    speed: str | None
    result: dict[str, Any]


def make_smaller(
    model: TextToImageModel,
    source: str,
    settings: SmallerSettings,
    output_dir: Path,
    *,
    drawing: Drawing,
    dtype: torch.dtype,
    prompts: list[Prompt] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Smaller:
    """Quantise `model`, save it to `output_dir` and measure it.

    Args:
        model: the model.
        source: name or folder from which the model was loaded.
        settings: settings of the quantisation.
        output_dir: folder of the copy.
        drawing: sampling settings of calibration images, and the size of the timed forward.
        dtype: dtype of the parts that are not quantised.
        prompts: prompts of calibration images; None without calibration.
        progress: is called after the quantisation, and after saving and measuring.

    Raises:
        UsageError: the backend cannot quantise this model with these settings.
    """
    before = report(model.denoiser)
    model, backends = _quantise(
        model, source, settings, drawing=drawing, dtype=dtype, prompts=prompts
    )
    progress()
    rows, size, part = settings.latency, drawing.size, model.denoiser_part
    seconds = forward_seconds(model, rows, size) if rows else None
    # Layers count what they cache in their first forward.
    after = report(model.denoiser)
    with folder_aside(output_dir) as folder:
        save_pipeline(model.pipeline, folder, card=card_of(source))
        times = None if seconds is None else _compare(model, seconds, source, rows, size)
        result = {
            "model": source,
            "backends": backends,
            "svd_rank": settings.svd_rank,
            "rounding": "gptq" if prompts and settings.gptq(backends[part]) else "nearest",
            **_sizes(before, after, folder, part),
            **({} if times is None else _rounded(times)),
        }
        text = json.dumps({**result, "versions": versions()}, indent=2)
        (folder / REPORT).write_text(text, encoding="utf-8")
    progress()
    speed = None if times is None else _describe(times, settings, set(backends.values()))
    return Smaller(part, after, speed, result)


def _sizes(
    before: ModuleReport, after: ModuleReport, folder: Path, part: str
) -> dict[str, int | float]:
    """Return the sizes of a quantised denoiser in memory and in the saved folder."""
    disk_bytes = folder_bytes(folder / part)
    return {
        "memory_bytes": after.bytes,
        "memory_bytes_before": before.bytes,
        "memory_ratio_to_bf16": round(after.ratio, 4),
        "bits_per_weight": round(after.bits_per_weight, 3),
        "quantised_fraction": round(after.quantised_fraction, 4),
        "disk_bytes": disk_bytes,
        "disk_ratio_to_bf16": round(after.bf16_bytes / disk_bytes, 4),
        "pipeline_disk_bytes": folder_bytes(folder),
    }


def _rounded(times: Comparison) -> dict[str, float]:
    """Return the times of a forward for the result."""
    return {
        "latency_ms": round(times.ms, 2),
        "bf16_latency_ms": round(times.plain_ms, 2),
        "latency_ratio": round(times.ratio, 3),
    }


def _quantise(
    model: TextToImageModel,
    source: str,
    settings: SmallerSettings,
    *,
    drawing: Drawing,
    dtype: torch.dtype,
    prompts: list[Prompt] | None,
) -> tuple[TextToImageModel, dict[str, str]]:
    """Quantise in place if the backend can, else by loading the model again."""
    name = resolve(settings.backend, device=model.device, model=model.denoiser)
    options: dict[str, Any] = {"group_size": settings.group_size, "svd_rank": settings.svd_rank}
    backend = BACKENDS[name]
    if backend.quantises_loaded:
        scales: dict[str, Any] = {}
        if prompts:
            settings.check_calibration(name)
            calibration = Calibration(model, prompts, drawing)
            if settings.gptq(name):
                memory = int(settings.calibration_memory * GIB)
                scales["moments"] = calibration.moments(memory=memory)
            elif settings.svd_rank:
                scales["input_scales"] = calibration.input_scales()
            if backend.activations:
                scales["activations"] = calibration.activation_scales()
        done = quantize_pipeline(model.pipeline, name, **scales, **options)
        if settings.components:
            # Text encoders have neither timesteps nor calibration, which few bits need.
            other = "int8" if backend.activations else "int4" if backend.bits < 4 else name
            done |= quantize_pipeline(
                model.pipeline,
                other,
                components=settings.components,
                group_size=settings.group_size,
            )
        return model, done
    if settings.components:
        raise UsageError(
            f"components: {name} quantises only the denoiser, while it loads. Use another backend for components."
        )
    config = quantization_config(name, device=model.device, **options)
    mapping = PipelineQuantizationConfig(quant_mapping={model.denoiser_part: config})
    again = load_model(source, dtype=dtype, device=model.device, quantization_config=mapping)
    return again, {model.denoiser_part: name}


def _compare(
    model: TextToImageModel,
    seconds: list[float],
    source: str,
    rows: int,
    size: tuple[int | None, int | None] | None,
) -> Comparison | None:
    """Time the original model in bfloat16 with the quantised denoiser freed.

    If memory runs out, warn and return None: the quantised folder is saved by then.
    """
    device, own = model.device, (model.denoiser_part, "scheduler")
    others = {n: part for n, part in model.pipeline.components.items() if n not in own}
    model.pipeline.register_modules(**{model.denoiser_part: None})
    try:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        plain = load_model(source, dtype=torch.bfloat16, **others)
        plain.denoiser.to(device)
        return Comparison.of(seconds, forward_seconds(plain, rows, size))
    except torch.OutOfMemoryError:
        logger.warning("latency: the original model does not fit in memory and is not timed")
        return None


def _describe(times: Comparison, settings: SmallerSettings, backends: set[str]) -> str:
    compiled = [n for n in sorted(backends) if BACKENDS[n].is_for_compile]
    more = f"; {compiled[0]} is made for torch.compile" if compiled else ""
    # The figures are rounded as in the file.
    rounded = _rounded(times)
    images = "1 image" if settings.latency == 1 else f"{settings.latency} images"
    return (
        f"{rounded['latency_ms']:.1f} ms per forward with {images}, {times.ratio:.2f} times the "
        f"{rounded['bf16_latency_ms']:.1f} ms in bfloat16 (both eager{more})"
    )
