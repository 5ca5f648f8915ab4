"""The verbs on LoRA files: convert, merge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FluxPipeline
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from diffalign.commands.images import load
from diffalign.core.errors import UsageError
from diffalign.core.files import aside, folder_aside
from diffalign.lora.files import WEIGHT_NAME
from diffalign.lora.formats import read, write
from diffalign.pipelines.flux import fold_guidance
from diffalign.schedulers.stock import scheduler_like


def convert(args: argparse.Namespace) -> int:
    """Rewrite a LoRA file."""
    source = Path(args.lora)
    found = read(source / WEIGHT_NAME if source.is_dir() else source)
    with aside(args.output) as file:
        write(found, file, to=args.to, family=args.family)
    print(f"{args.output}: {len(found.down)} modules in {args.to}'s keys")
    return 0


def _scheduler(asked: str, own: Any) -> Any:
    """Of a folder with `scheduler_config.json`, of whatever class that names; or of a class of diffusers with the
    configuration of the pipeline's own and what is given besides: "TCDScheduler,timestep_spacing=trailing"."""
    folder = Path(asked)
    if not folder.exists() and "Scheduler" in asked and "/" not in asked:
        return scheduler_like(asked, own)
    try:
        config = json.loads((folder / SCHEDULER_CONFIG_NAME).read_text(encoding="utf-8"))
        return getattr(diffusers, config["_class_name"]).from_pretrained(folder)
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise UsageError(f"--scheduler: {folder} holds no scheduler: {error}") from error


def merge(args: argparse.Namespace) -> int:
    """Save a pipeline whose weights hold the LoRA: it loads and runs without adapters, at the base's speed."""
    if args.output_dir.exists():
        raise UsageError(f"--output_dir: {args.output_dir} exists already")
    pipeline = load(args).pipeline
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    if args.fold_guidance is not None:
        if not isinstance(pipeline, FluxPipeline):
            raise UsageError(f"--fold_guidance is for FLUX, and {args.model} is none")
        folded = fold_guidance(pipeline.transformer, args.fold_guidance)
        pipeline.register_modules(transformer=folded)
    if args.scheduler is not None:
        pipeline.register_modules(scheduler=_scheduler(args.scheduler, pipeline.scheduler))
    with folder_aside(args.output_dir) as folder:
        pipeline.save_pretrained(folder)
    print(f"{args.output_dir}: {args.model} with {args.lora} in its weights")
    return 0
