"""The verbs that need torch: train, demo, generate, evaluate."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from diffalign.bench.record import BenchOptions, run_bench
from diffalign.config import EvaluationConfig, RunConfig, load
from diffalign.data.images import read_folder
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.errors import UsageError, UserError
from diffalign.evaluation.folder import score_folder
from diffalign.evaluation.report import image_grid
from diffalign.evaluation.score import evaluate_model
from diffalign.lora import WEIGHT_NAME, load_lora
from diffalign.lora_formats import read, write
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import load_meta_model, load_model
from diffalign.rewards.composition import CompositeReward
from diffalign.training.memory import forecast
from diffalign.training.run import run
from diffalign.training.run_folder import SUMMARY
from diffalign.types import no_reward
from diffalign.versions import versions


def train(config: RunConfig) -> int:
    """Run a configuration and print what it will need and what came of it."""
    if PartialState().is_main_process:
        print_forecast(config)
    summary = run(config)
    if PartialState().is_main_process:
        print_summary(summary)
    return 0


def print_forecast(config: RunConfig) -> None:
    """The memory forecast, before anything is loaded."""
    c = config.model
    try:
        model = load_meta_model(
            c.name,
            dtype=getattr(torch, c.dtype),
            revision=c.revision,
            max_sequence_length=c.max_sequence_length,
        )
        print(forecast(model, config))
    except (OSError, UserError):
        return  # no configuration to read, or one that cannot be run: loading it for good will say so


def demo(args: argparse.Namespace) -> int:
    """The recipe `demo`. A finished demo is kept aside, an interrupted one goes on."""
    folder = Path(args.output_dir)
    if (folder / SUMMARY).is_file():
        number = 1
        while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(kept)
        print(f"kept the previous demo as {kept}")
    return train(load("demo", [f"--output_dir={folder}"]))


def print_summary(summary: dict) -> None:
    """A table of both evaluations."""
    table = Table(title=f"held-out prompts, {summary['updates']} updates on {summary['device']}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for part in ("tasks", "means"):
        after, before = summary["after"][part], summary["before"][part]
        for name in after:
            if name in before:
                table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
        table.add_section()
    Console().print(table)
    print(f"training {summary['training_seconds']:.0f} s, in all {summary['seconds']:.0f} s")


def _load(args: argparse.Namespace) -> TextToImageModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, dtype=getattr(torch, args.dtype), device=device)
    if args.lora is not None:
        if not Path(args.lora).exists() and args.lora.count("/") != 1:
            raise UsageError(f"--lora: {args.lora} does not exist")
        load_lora(model.pipeline, args.lora)
    return model


def _evaluation(args: argparse.Namespace) -> EvaluationConfig:
    return EvaluationConfig(
        num_inference_steps=args.num_inference_steps,
        solver=args.solver,
        guidance_scale=args.guidance_scale,
        images_per_prompt=args.images_per_prompt,
        images_per_task=getattr(args, "images_per_task", None),
        seed=args.seed,
    )


def _batching(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "height": args.height,
        "width": args.width,
        "micro_batch_size": args.batch_size,
        "mixed_precision": "bf16" if args.dtype == "bfloat16" else "no",
    }


def generate(args: argparse.Namespace) -> int:
    """Write every image as PNG, and a grid."""
    prompts: list[Prompt] = []
    for text in args.prompts:
        prompts += load_prompts(text) if text.endswith((".txt", ".jsonl")) else [Prompt(text)]
    model = _load(args)
    found = evaluate_model(model, prompts, no_reward, _evaluation(args), **_batching(args))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(found.prompts, found.images, strict=True)):
        name = re.sub(r"[^a-z0-9]+", "-", prompt.text.lower()).strip("-")[:60]
        image_grid(image[None], columns=1, gap=0).save(folder / f"{i:04d}-{name}.png")
    image_grid(found.images, columns=args.images_per_prompt).save(folder / "grid.png")
    print(f"{len(found.prompts)} images in {folder}, all of them in {folder / 'grid.png'}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Score a model on prompts, or a folder of images; the last line of the output is JSON."""
    if args.what == "rewards":
        return _evaluate_folder(args)
    if args.images is not None:
        raise UsageError("--images: meant `diffalign evaluate rewards --images ...`?")
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    reward = _rewards(args.rewards, [p.metadata for p in prompts])
    model = _load(args)
    found = evaluate_model(model, prompts, reward.score, _evaluation(args), **_batching(args))
    result = {
        "model": args.model,
        "lora": args.lora,
        "prompts": args.prompts,
        "num_inference_steps": args.num_inference_steps,
        "solver": args.solver,
        "guidance_scale": args.guidance_scale,
        "images_per_task": args.images_per_task,
        "seed": args.seed,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        **found.to_dict(),
        "versions": versions(),
    }
    title = f"{args.model}{' + ' + args.lora if args.lora else ''}"
    _print_scores(title, {**found.tasks, **found.means})
    _write(args.output, result)
    print(json.dumps(result))
    return 0


def _evaluate_folder(args: argparse.Namespace) -> int:
    if args.images is None:
        raise UsageError("evaluate rewards needs --images DIR")
    images = read_folder(args.images)
    reward = _rewards(args.rewards, [i.prompt.metadata for i in images])
    without = sum(not i.prompt.text for i in images)
    blind = [n for n, r in reward.rewards.items() if r.needs_prompt]
    if blind and without == len(images):
        raise UsageError(
            f"{', '.join(blind)} needs captions, and no image of {args.images} has one; see docs/rewards.md"
        )
    rows, means = score_folder(images, reward.score, batch_size=args.batch_size)
    unreadable = sum("error" in row for row in rows)
    result = {
        "folder": str(args.images),
        "images": len(rows),
        "unreadable": unreadable,
        "without_caption": without,
        "failed": {n: count for n, count in reward.failures.items() if count},
        "means": means,
        "rewards": {n: vars(r.card) for n, r in reward.rewards.items()},
        "versions": versions(),
    }
    _print_scores(f"{len(rows) - unreadable} of {len(rows)} images in {args.images}", means)
    _write(args.output, {**result, "scores": rows})
    print(json.dumps(result))
    if unreadable == len(rows):
        raise UsageError(f"no image could be read, for instance {rows[0]['error']}")
    if not means:
        raise UsageError(f"no image could be scored: {reward.last_error or 'all rewards are NaN'}")
    return 0


def _rewards(names: str, metadata: Sequence[Mapping[str, Any]]) -> CompositeReward:
    """From names between commas, ready to score prompts with this metadata."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise UsageError("--rewards names none")
    reward = CompositeReward.from_config(dict.fromkeys(chosen, 1.0))
    reward.check_metadata(metadata)
    reward.prepare()
    return reward


def _print_scores(title: str, scores: Mapping[str, float]) -> None:
    table = Table(title=title)
    table.add_column("")
    table.add_column("score", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)


def _write(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2), encoding="utf-8")


def bench(args: argparse.Namespace) -> int:
    """Run a benchmark; the last line of the output is JSON."""
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 3
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {seeds}")
    work = args.work / (f"{args.name}-quick" if args.quick else args.name)
    arms = None if args.arms is None else tuple(a.strip() for a in args.arms.split(","))
    options = BenchOptions(quick=args.quick, work=work, seeds=seeds, arms=arms)
    print(json.dumps(run_bench(args.name, options, output=args.output)))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Rewrite a LoRA file."""
    source = Path(args.lora)
    found = read(source / WEIGHT_NAME if source.is_dir() else source)
    write(found, args.output, to=args.to, family=args.family)
    print(f"{args.output}: {len(found.down)} modules in {args.to}'s keys")
    return 0


def merge(args: argparse.Namespace) -> int:
    """Save a pipeline whose weights hold the LoRA: it loads and runs without adapters, at the base's speed."""
    if args.output_dir.exists():
        raise UsageError(f"--output_dir: {args.output_dir} exists already")
    pipeline = _load(args).pipeline
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {args.model} with {args.lora} in its weights")
    return 0
