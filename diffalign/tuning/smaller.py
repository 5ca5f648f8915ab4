"""A smaller copy of a model: quantise, save, and measure size and speed."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
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
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.saving import save_pipeline
from diffalign.quantization.accounting import ModuleReport, folder_bytes, report
from diffalign.quantization.apply import quantization_config, quantize_pipeline
from diffalign.quantization.backends import BACKENDS, resolve
from diffalign.quantization.latency import Comparison, forward_seconds
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.evaluator import Drawing

logger = logging.getLogger(__name__)
REPORT = "quantization.json"


@dataclass(frozen=True)
class SmallerSettings:
    """How a model is quantised.

    `components`: parts beside the denoiser. `latency`: images of the forward that is timed, 0 for none.
    """

    backend: str = "auto"
    components: Sequence[str] = ()
    group_size: int = 64
    svd_rank: int = 0
    latency: int = 1

    def check(self, prompts: Sequence[Prompt] | None) -> None:
        """Raise UsageError where the settings do not fit together, or not to the calibration prompts."""
        if self.latency < 0:
            raise UsageError(f"--latency must be at least 0, got {self.latency}")
        static = self.backend in BACKENDS and BACKENDS[self.backend].activations
        if static and not prompts:
            raise UsageError(f"--backend {self.backend} is calibrated on images: give --prompts")
        if prompts and not (self.svd_rank or static):
            raise UsageError(
                "--prompts: calibration is for int8-static and for the low-rank branch; give --svd_rank, too"
            )


@dataclass(frozen=True)
class Smaller:
    """A quantised model: the folder of its denoiser, size and speed for people, and the result for programs."""

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
) -> Smaller:
    """Quantise `model`, which was loaded from `source`, save it to `output_dir` and measure it.

    Args:
        drawing: how calibration images are drawn, and the size of the timed forward.
        dtype: of the parts that stay as they are.
        prompts: calibrate on images of these.

    Raises:
        UsageError: the backend cannot quantise this model with these settings.
    """
    before = report(model.denoiser)
    model, backends = _quantise(
        model, source, settings, drawing=drawing, dtype=dtype, prompts=prompts
    )
    size = {"height": drawing.height, "width": drawing.width}
    seconds = forward_seconds(model, settings.latency, **size) if settings.latency else None
    after = report(model.denoiser)  # with what layers keep once they have run
    result: dict[str, Any] = {
        "model": source,
        "backends": backends,
        "svd_rank": settings.svd_rank,
        "memory_bytes": after.bytes,
        "memory_bytes_before": before.bytes,
        "memory_ratio_to_bf16": round(after.ratio, 4),
        "bits_per_weight": round(after.bits_per_weight, 3),
        "quantised_fraction": round(after.quantised_fraction, 4),
    }
    with folder_aside(output_dir) as folder:
        save_pipeline(model.pipeline, folder, card=card_of(source))
        part = "unet" if (folder / "unet").is_dir() else "transformer"
        result["disk_bytes"] = folder_bytes(folder / part)
        result["disk_ratio_to_bf16"] = round(after.bf16_bytes / result["disk_bytes"], 4)
        result["pipeline_disk_bytes"] = folder_bytes(folder)
        times = None
        if seconds is not None:
            times = _compare(model, seconds, source, settings.latency, size)
        if times is not None:
            result["latency_ms"] = round(times.ms, 2)
            result["bf16_latency_ms"] = round(times.plain_ms, 2)
            result["latency_ratio"] = round(times.ratio, 3)
        text = json.dumps({**result, "versions": versions()}, indent=2)
        (folder / REPORT).write_text(text, encoding="utf-8")
    speed = None if times is None else _told(times, settings, set(backends.values()))
    return Smaller(part, after, speed, result)


def _quantise(
    model: TextToImageModel,
    source: str,
    settings: SmallerSettings,
    *,
    drawing: Drawing,
    dtype: torch.dtype,
    prompts: list[Prompt] | None,
) -> tuple[TextToImageModel, dict[str, str]]:
    """Quantise in place where the backend can, else by loading the model again."""
    name = resolve(settings.backend, device=model.device, model=model.denoiser)
    options = {"group_size": settings.group_size, "svd_rank": settings.svd_rank}
    backend = BACKENDS[name]
    if backend.is_packed or backend.settings:
        scales: dict[str, Any] = {}
        if prompts:
            watched = Calibration(model, prompts, drawing)
            if settings.svd_rank:
                scales["input_scales"] = watched.input_scales()
            if backend.activations:
                scales["activations"] = watched.activation_scales()
        done = quantize_pipeline(model.pipeline, name, **scales, **options)
        if settings.components:
            other = "int8" if backend.activations else name  # text encoders meet no timesteps
            done |= quantize_pipeline(
                model.pipeline,
                other,
                components=settings.components,
                group_size=settings.group_size,
            )
        return model, done
    part = "unet" if hasattr(model.pipeline, "unet") else "transformer"
    if settings.components:
        raise UsageError(
            f"--components: {name} quantises the denoiser while it loads, nothing else"
        )
    config = quantization_config(name, device=model.device, **options)
    mapping = PipelineQuantizationConfig(quant_mapping={part: config})
    again = load_model(source, dtype=dtype, device=model.device, quantization_config=mapping)
    return again, {part: name}


def _compare(
    model: TextToImageModel,
    seconds: list[float],
    source: str,
    rows: int,
    size: dict[str, int | None],
) -> Comparison | None:
    """Time the model as it was, in bfloat16, with the quantised denoiser freed.

    None, with a warning, where it does not fit: the quantised folder is saved by then.
    """
    device, own = model.device, ("unet", "transformer", "scheduler")
    others = {n: part for n, part in model.pipeline.components.items() if n not in own}
    part = "unet" if hasattr(model.pipeline, "unet") else "transformer"
    model.pipeline.register_modules(**{part: None})
    try:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        plain = load_model(source, dtype=torch.bfloat16, **others)
        plain.denoiser.to(device)
        return Comparison.of(seconds, forward_seconds(plain, rows, **size))
    except torch.OutOfMemoryError:
        logger.warning("--latency: no room for the model as it was, which is not timed")
        return None


def _told(times: Comparison, settings: SmallerSettings, backends: set[str]) -> str:
    compiled = [n for n in sorted(backends) if BACKENDS[n].settings and not BACKENDS[n].trains]
    more = f"; {compiled[0]} is made for torch.compile" if compiled else ""
    # rounded as the file has them
    ms, plain_ms = round(times.ms, 2), round(times.plain_ms, 2)
    return (
        f"a forward for {settings.latency} images: {ms:.1f} ms, {times.ratio:.2f} of the {plain_ms:.1f} ms in "
        f"bfloat16 (both eager{more})"
    )
