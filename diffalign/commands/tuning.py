"""The verb qsched: find a schedule's factors and keep them beside the model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffalign.commands.images import chosen_prompts, load
from diffalign.core.errors import UsageError
from diffalign.core.files import folder_aside, write_text
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import available, load_model
from diffalign.rewards.composition import CompositeReward
from diffalign.tuning.evaluator import Drawing
from diffalign.tuning.objective import parse
from diffalign.tuning.plot import check_plot, plot_history
from diffalign.tuning.tune import Settings, TuneResult, tune

RESULT = "qsched.json"


def qsched(args: argparse.Namespace) -> int:
    """Search, say what was found, and write it where the model is, or a copy of the model with it."""
    if args.lora is not None:
        raise UsageError(
            "--lora: factors belong to one set of weights; `diffalign merge` makes it one"
        )
    folder, whole = _target(args)
    if args.plot is not None:
        check_plot(args.plot)
    if args.engine == "none" and args.reference is None:
        raise UsageError("--engine none is the closed form alone, which needs a --reference")
    settings = Settings(
        parse(args.objective),
        engine=args.engine,
        budget=args.budget,
        low=args.box[0],
        high=args.box[1],
        penalty=args.penalty,
        held_out=args.held_out,
        seed=args.seed,
    )
    reward = CompositeReward.from_config(settings.objective, setting="--objective")
    prompts = chosen_prompts(args)
    drawing = Drawing(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        micro_batch_size=args.batch_size,
        mixed_precision="bf16" if args.dtype == "bfloat16" else "no",
    )
    if args.work.exists() and not args.work.is_dir():
        raise UsageError(f"--work: {args.work} is a file; scores are kept in a folder")
    reward.check_metadata([p.metadata for p in prompts])
    reward.prepare()
    model = load(args)
    reference = _reference(args, model)
    file = args.work / "scores.jsonl"
    result = tune(model, prompts, reward.score, settings, drawing, reference=reference, file=file)
    result.apply(model.pipeline)
    save(model.pipeline, result, folder, whole=whole)
    if args.plot is not None:
        plot_history(result, args.plot)
    print(describe(result, folder, kept=_kept(result, model.pipeline)))
    return 0


def _kept(result: TuneResult, pipeline: Any) -> bool:
    """Whether factors of an earlier search are still in force, after one that found none."""
    steps = len(result.best)
    return not result.accepted and not pipeline.scheduler.tables.steps[steps].identity


def _target(args: argparse.Namespace) -> tuple[Path, bool]:
    """Where the factors go: into the model's own folder, or with a copy of the model (True) into a new one."""
    named = args.model in available()  # such a name is no folder, even if there is one of that name
    own = Path(args.model) if not named and Path(args.model).is_dir() else None
    target = args.output_dir or own
    if target is None:
        raise UsageError(
            f"--output_dir: {args.model} is no folder of yours, so the model with its factors needs one"
        )
    if own is not None and target.resolve() == own.resolve():
        return own, False
    if target.exists():
        raise UsageError(f"--output_dir: {target} exists already")
    return target, True


def _reference(args: argparse.Namespace, model: TextToImageModel) -> TextToImageModel | None:
    if args.reference is None:
        return None
    return load_model(args.reference, dtype=getattr(torch, args.dtype), device=model.device)


def save(pipeline: Any, result: TuneResult, folder: Path, *, whole: bool) -> None:
    """The pipeline, or where it lies there already its scheduler's configuration alone: whole or not at all."""
    if whole:
        with folder_aside(folder) as hidden:
            pipeline.save_pretrained(hidden)
            result.save(hidden / RESULT)
        return
    text = pipeline.scheduler.to_json_string()
    write_text(folder / "scheduler" / "scheduler_config.json", text)
    result.save(folder / RESULT)


def describe(result: TuneResult, folder: Path, *, kept: bool = False) -> str:
    """A few lines for people, the last of them JSON. `kept`: factors were there before, and stay."""
    low, high = result.interval
    sure = f"95 % interval {low:+.3f}..{high:+.3f}"
    verdict = f"accepted: {result.gain:+.3f} standard deviations on held-out prompts, {sure}"
    if not result.accepted:
        verdict = (
            f"not accepted: held-out prompts see {result.gain:+.3f}, {sure}, which may be nothing; "
            + ("the factors of an earlier search stay" if kept else "the schedule stays as it is")
        )
    lines = [verdict, "step  sample  model_output"]
    pairs = zip(result.best.sample, result.best.model_output, strict=True)
    lines += [f"{i:4}  {a:6.4f}  {b:6.4f}" for i, (a, b) in enumerate(pairs)]
    lines.append(f"{folder}: scheduler/scheduler_config.json and {RESULT}")
    plain = replace(result, history=[]).to_dict()
    del plain["history"]
    return "\n".join([*lines, json.dumps(plain)])
