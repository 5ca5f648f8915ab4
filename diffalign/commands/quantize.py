"""The verb quantize: a smaller copy of a model, and what that made of it."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig
from torch import Tensor, nn

from diffalign.commands.images import load
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.errors import UsageError
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.sampling import EmbedCache, Sampling
from diffalign.precision import attention
from diffalign.quantization.accounting import folder_bytes, report
from diffalign.quantization.apply import quantization_config, quantize_pipeline
from diffalign.quantization.backends import BACKENDS, resolve
from diffalign.quantization.lowrank import collect_input_scales
from diffalign.versions import versions

REPORT = "quantization.json"


def quantize(args: argparse.Namespace) -> int:
    """Quantise, save, say how large and how fast it is; the last line is JSON."""
    if args.output_dir.exists():
        raise UsageError(f"--output_dir: {args.output_dir} exists already")
    if args.lora is not None:
        raise UsageError(
            "--lora: weights are quantised with the LoRA in them; `diffalign merge` first"
        )
    prompts = load_prompts(args.prompts, limit=args.max_prompts) if args.prompts else None
    if prompts and not args.svd_rank:
        raise UsageError("--prompts: calibration is for the low-rank branch; give --svd_rank, too")
    model = load(args)
    before = report(model.denoiser)
    seconds = latency(model, args) if args.latency else None
    model, backends = _quantise(model, args, prompts)
    after = report(model.denoiser)
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
    if seconds is not None:
        found["latency_ratio"] = round(latency(model, args) / seconds, 3)
    model.pipeline.save_pretrained(args.output_dir)
    part = "unet" if (args.output_dir / "unet").is_dir() else "transformer"
    found["disk_bytes"] = folder_bytes(args.output_dir / part)
    found["disk_ratio_to_bf16"] = round(after.bf16_bytes / found["disk_bytes"], 4)
    found["pipeline_disk_bytes"] = folder_bytes(args.output_dir)
    result = {**found, "versions": versions()}
    (args.output_dir / REPORT).write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(after)
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
        scales = None if prompts is None else input_scales(model, prompts, args)
        done = quantize_pipeline(model.pipeline, name, input_scales=scales, **options)
        if args.components:
            done |= quantize_pipeline(
                model.pipeline, name, components=args.components, group_size=args.group_size
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


@torch.no_grad()
def input_scales(
    model: TextToImageModel, prompts: list[Prompt], args: argparse.Namespace
) -> dict[str, Tensor]:
    """Of the denoiser's layers while it draws the prompts with its own steps: a few-step model is
    calibrated on all the timesteps that it ever sees."""
    embed = EmbedCache(model)
    guided = model.costs_a_forward(args.guidance_scale)
    size = args.height or model.default_size[0], args.width or model.default_size[1]

    def draw() -> None:
        for start in range(0, len(prompts), args.batch_size):
            texts = [p.text for p in prompts[start : start + args.batch_size]]
            negative = embed([""]).repeat_first(len(texts)) if guided else None
            run = Sampling(
                model, embed(texts), args.num_inference_steps, *size, args.guidance_scale, negative
            )
            run.draw(
                [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(texts))]
            )

    with attention(model.device):
        return collect_input_scales(model.denoiser, draw)


@torch.no_grad()
def latency(model: TextToImageModel, args: argparse.Namespace) -> float:
    """Median seconds of one forward of the denoiser for --latency images."""
    size = args.height or model.default_size[0], args.width or model.default_size[1]
    inputs = model.random_inputs(args.latency, *size)
    with attention(model.device):
        return timed(model.denoiser, lambda: model.forward(*inputs))


def timed(module: nn.Module, call: Callable[[], Any], *, repeats: int = 7) -> float:
    """Median seconds of a call, after two to warm up."""
    device = next(module.parameters()).device
    found = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])
