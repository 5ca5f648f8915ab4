"""Quantise and save a copy of a model, and measure its size and speed."""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.core.files import folder_aside
from diffalign.core.versions import versions
from diffalign.data.prompts import Prompt
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import card_of
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.saving import agree_on_dtype, save_pipeline
from diffalign.quantization.accounting import ModuleReport, folder_bytes, report
from diffalign.quantization.backends import BACKENDS
from diffalign.quantization.latency import Comparison, forward_seconds
from diffalign.quantization.svdquant import Export, export_pipeline
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.quantising import Quantised, SmallerSettings, quantise

logger = logging.getLogger(__name__)
REPORT = "quantization.json"


@dataclass(frozen=True)
class Smaller:
    """Quantised model: folder of its denoiser, its size and speed, and the result as JSON."""

    part: str
    weights: ModuleReport | Export
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
    if settings.precision is not None:
        return _exported(
            model, source, settings, output_dir, calibrate=(prompts, drawing), progress=progress
        )
    before = report(model.denoiser)
    calibration = Calibration(model, prompts, drawing) if prompts else None
    done = quantise(model, source, settings, dtype=dtype, calibration=calibration)
    model, backends = done.model, done.backends
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
            **({} if done.tuning is None else {"tuning": asdict(done.tuning)}),
            **({} if done.psnr is None else {"psnr": round(done.psnr, 2)}),
            **({} if done.bits is None else {"layers_by_bits": _counts(done.bits)}),
            **_sizes(before, after, folder, part),
            **({} if times is None else _rounded(times)),
        }
        _write_report(folder, result)
    progress()
    speed = None if times is None else _describe(times, settings, set(backends.values()))
    return Smaller(part, after, speed, result)


def _exported(
    model: TextToImageModel,
    source: str,
    settings: SmallerSettings,
    output_dir: Path,
    *,
    calibrate: tuple[list[Prompt] | None, Drawing],
    progress: Callable[[], None],
) -> Smaller:
    """Save a model in SVDQuant's layout, without a time: its kernels are not run."""
    part, (prompts, drawing) = model.denoiser_part, calibrate
    plain_bytes = report(model.denoiser).bf16_bytes
    done = Quantised(model, {part: settings.layout})
    if settings.precision == "int4":
        calibration = Calibration(model, prompts, drawing) if prompts else None
        done = quantise(model, source, settings, dtype=torch.bfloat16, calibration=calibration)
    progress()
    with folder_aside(output_dir) as folder:
        export = export_pipeline(
            model.pipeline, folder, precision=str(settings.precision), rank=settings.svd_rank
        )
        agree_on_dtype(folder)
        card_of(source).save(folder)
        disk_bytes = folder_bytes(folder / part)
        result = {
            "model": source,
            "layout": settings.layout,
            "svd_rank": settings.svd_rank,
            "rounding": "gptq" if prompts and settings.gptq("int4") else "nearest",
            **({} if done.psnr is None else {"psnr": round(done.psnr, 2)}),
            "layers_in_4_bits": len(export.targets),
            "disk_bytes": disk_bytes,
            "disk_ratio_to_bf16": round(plain_bytes / disk_bytes, 4),
            "pipeline_disk_bytes": folder_bytes(folder),
        }
        _write_report(folder, result)
    progress()
    return Smaller(part, export, None, result)


def _write_report(folder: Path, result: dict[str, Any]) -> None:
    text = json.dumps({**result, "versions": versions()}, indent=2)
    (folder / REPORT).write_text(text, encoding="utf-8")


def _counts(bits: dict[str, int]) -> dict[str, int]:
    """Return how many layers have each number of bits."""
    return {str(b): count for b, count in sorted(Counter(bits.values()).items())}


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
