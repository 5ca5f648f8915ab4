"""`diffalign quantize`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.verb import Verb
from diffalign.quantization.backends import BACKENDS


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `quantize`."""
    parser.add_argument(
        "--backend",
        default="auto",
        help=f"auto, {', '.join(BACKENDS)}; default: %(default)s, by device",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="must not exist yet")
    parser.add_argument(
        "--components",
        nargs="+",
        default=(),
        metavar="NAME",
        help="besides the denoiser, such as text_encoder_2",
    )
    parser.add_argument(
        "--group_size",
        type=int,
        default=64,
        help="weights with one scale, of int4 and int8; default: %(default)s",
    )
    parser.add_argument(
        "--svd_rank",
        type=int,
        default=0,
        help="of a low-rank branch (SVDQuant) beside int4, int8, int8-static, torchao-int8wo or torchao-fp8wo; "
        "default: none",
    )
    parser.add_argument(
        "--prompts",
        default=None,
        help="calibrate that branch, or int8-static, on what the model sees while it draws these",
    )
    parser.add_argument("--max_prompts", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--latency",
        type=int,
        default=1,
        help="images of the forward that is timed beside bfloat16; 0: none; default: %(default)s",
    )
    options.add_model(parser)
    options.add_drawing(parser, solver=False)


def run(args: argparse.Namespace) -> None:
    """Quantise, save, and print how large and how fast the copy is; the last line is JSON."""
    import torch

    from diffalign.cli.models import chosen_prompts, load, settle_drawing
    from diffalign.core.errors import UsageError
    from diffalign.tuning.evaluator import Drawing
    from diffalign.tuning.smaller import SmallerSettings, make_smaller

    if args.output_dir.exists():
        raise UsageError(f"--output_dir: {args.output_dir} exists already")
    if args.lora is not None:
        raise UsageError(
            "--lora: weights are quantised with the LoRA in them; `diffalign merge` first"
        )
    prompts = chosen_prompts(args) if args.prompts else None
    settings = SmallerSettings(
        args.backend, args.components, args.group_size, args.svd_rank, args.latency
    )
    settings.check(prompts)
    settle_drawing(args)
    drawing = Drawing(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        seed=args.seed,
        micro_batch_size=args.batch_size,
    )
    smaller = make_smaller(
        load(args),
        args.model,
        settings,
        args.output_dir,
        drawing=drawing,
        dtype=getattr(torch, args.dtype),
        prompts=prompts,
    )
    print(smaller.weights)
    if smaller.speed is not None:
        print(smaller.speed)
    size = f"{smaller.part} of {smaller.result['disk_bytes']:,} bytes"
    print(f"{args.output_dir}: {size}; diffalign.load reads it")
    print(json.dumps(smaller.result))


VERB = Verb(
    "quantize",
    "a smaller copy of a model: 8 or 4 bits a weight, convolutions too",
    add_flags,
    run,
    description="Quantise a model's denoiser and save a folder that `diffalign.load` and every verb read "
    "(docs/qsched.md). Prints true bytes in memory and on disk, and the time of a forward beside the original's.",
)
