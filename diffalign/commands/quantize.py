"""The verb quantize: a smaller copy of a model, and what that made of it."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from diffalign.commands.images import chosen_prompts, load
from diffalign.core.errors import UsageError
from diffalign.core.files import folder_aside
from diffalign.core.versions import versions
from diffalign.data.prompts import Prompt
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import load_model
from diffalign.quantization.accounting import folder_bytes, report
from diffalign.quantization.apply import quantization_config, quantize_pipeline
from diffalign.quantization.backends import BACKENDS, resolve
from diffalign.quantization.latency import Comparison, compare
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.evaluator import Drawing

REPORT = "quantization.json"


def quantize(args: argparse.Namespace) -> int:
    """Quantise, save, say how large and how fast it is; the last line is JSON."""
    if args.output_dir.exists():
        raise UsageError(f"--output_dir: {args.output_dir} exists already")
    if args.lora is not None:
        raise UsageError(
            "--lora: weights are quantised with the LoRA in them; `diffalign merge` first"
        )
    prompts = chosen_prompts(args) if args.prompts else None
    if args.latency < 0:
        raise UsageError(f"--latency must be at least 0, got {args.latency}")
    static = args.backend in BACKENDS and BACKENDS[args.backend].activations
    if static and not prompts:
        raise UsageError(f"--backend {args.backend} is calibrated on images: give --prompts")
    if prompts and not (args.svd_rank or static):
        raise UsageError(
            "--prompts: calibration is for int8-static and for the low-rank branch; give --svd_rank, too"
        )
    model = load(args)
    before = report(model.denoiser)
    model, backends = _quantise(model, args, prompts)
    times = _latency(model, args) if args.latency else None
    after = report(model.denoiser)  # with what layers keep once they have run
    found: dict[str, Any] = {
        "model": args.model,
        "backends": backends,
        "svd_rank": args.svd_rank,
        "memory_bytes": after.bytes,
        "memory_bytes_before": before.bytes,
        "memory_ratio_to_bf16": round(after.ratio, 4),
        "bits_per_weight": round(after.bits_per_weight, 3),
        "quantised_fraction": round(after.quantised_fraction, 4),
    }
    if times is not None:
        found["latency_ms"] = round(times.ms, 2)
        found["bf16_latency_ms"] = round(times.plain_ms, 2)
        found["latency_ratio"] = round(times.ratio, 3)
    with folder_aside(args.output_dir) as folder:
        model.pipeline.save_pretrained(folder)
        part = "unet" if (folder / "unet").is_dir() else "transformer"
        found["disk_bytes"] = folder_bytes(folder / part)
        found["disk_ratio_to_bf16"] = round(after.bf16_bytes / found["disk_bytes"], 4)
        found["pipeline_disk_bytes"] = folder_bytes(folder)
        result = {**found, "versions": versions()}
        (folder / REPORT).write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(after)
    if times is not None:
        print(_told(times, args, set(backends.values())))
    print(f"{args.output_dir}: {part} of {found['disk_bytes']:,} bytes; diffalign.load reads it")
    print(json.dumps(found))
    return 0


def _quantise(
    model: TextToImageModel, args: argparse.Namespace, prompts: list[Prompt] | None
) -> tuple[TextToImageModel, dict[str, str]]:
    """In place where the backend can, else by loading the model again."""
    name = resolve(args.backend, device=model.device, model=model.denoiser)
    options = {"group_size": args.group_size, "svd_rank": args.svd_rank}
    chosen = BACKENDS[name]
    if chosen.is_packed or chosen.settings:
        scales: dict[str, Any] = {}
        if prompts:
            watched = calibration(model, prompts, args)
            if args.svd_rank:
                scales["input_scales"] = watched.input_scales()
            if chosen.activations:
                scales["activations"] = watched.activation_scales()
        done = quantize_pipeline(model.pipeline, name, **scales, **options)
        if args.components:
            other = "int8" if chosen.activations else name  # text encoders meet no timesteps
            done |= quantize_pipeline(
                model.pipeline, other, components=args.components, group_size=args.group_size
            )
        return model, done
    part = "unet" if hasattr(model.pipeline, "unet") else "transformer"
    if args.components:
        raise UsageError(
            f"--components: {name} quantises the denoiser while it loads, nothing else"
        )
    config = quantization_config(name, device=model.device, **options)
    mapping = PipelineQuantizationConfig(quant_mapping={part: config})
    dtype = getattr(torch, args.dtype)
    again = load_model(args.model, dtype=dtype, device=model.device, quantization_config=mapping)
    return again, {part: name}


def calibration(
    model: TextToImageModel, prompts: list[Prompt], args: argparse.Namespace
) -> Calibration:
    """The denoiser, drawing the prompts as the flags say."""
    drawing = Drawing(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        seed=args.seed,
        micro_batch_size=args.batch_size,
    )
    return Calibration(model, prompts, drawing)


def _latency(model: TextToImageModel, args: argparse.Namespace) -> Comparison:
    """Beside the model as it was, in bfloat16 whatever --dtype; of that the denoiser alone is read again."""
    kept = ("unet", "transformer", "scheduler")
    others = {n: part for n, part in model.pipeline.components.items() if n not in kept}
    plain = load_model(args.model, dtype=torch.bfloat16, device=model.device, **others)
    return compare(model, plain, args.latency, height=args.height, width=args.width)


def _told(times: Comparison, args: argparse.Namespace, backends: set[str]) -> str:
    compiled = [n for n in sorted(backends) if BACKENDS[n].settings and not BACKENDS[n].trains]
    more = f"; {compiled[0]} is made for torch.compile" if compiled else ""
    ours, plain = round(times.ms, 2), round(times.plain_ms, 2)  # as the file has them
    return (
        f"a forward for {args.latency} images: {ours:.1f} ms, {times.ratio:.2f} of the {plain:.1f} ms in "
        f"bfloat16 (both eager{more})"
    )
