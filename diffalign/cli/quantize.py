"""`diffalign quantize`."""

from __future__ import annotations

import argparse

from diffalign.cli import options, types
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb
from diffalign.quantization.backends import BACKENDS


def add_flags(parser: Parser) -> None:
    """Add the flags of `quantize`."""
    parser.add_argument(
        "--backend",
        type=types.backend,
        default="auto",
        metavar="NAME",
        help=f"format of the weights: auto (chosen for this device), {', '.join(BACKENDS)} (default: %(default)s)",
    )
    options.add_output_dir(parser, None, "new folder of the smaller model", kind=types.new_folder)
    parser.add_argument(
        "--components",
        nargs="+",
        default=(),
        metavar="NAME",
        help="parts to quantise besides the denoiser, such as text_encoder_2",
    )
    options.add_count(parser, "--group_size", 64, "weights that share one scale, for int4 and int8")
    options.add_count(
        parser,
        "--svd_rank",
        0,
        "rank of a low-rank branch (SVDQuant) beside int4, int8, int8-static, torchao-int8wo or torchao-fp8wo; 0: none",
        low=0,
    )
    options.add_prompts(parser, None)
    options.add_count(parser, "--max_prompts", 32, "use only N of the calibration prompts")
    options.add_count(
        parser,
        "--latency",
        1,
        "batch size of the forward pass that is timed beside bfloat16; 0: time nothing",
        low=0,
    )
    options.add_model(
        parser,
        lora=types.refused(
            "the LoRA has to be in the weights before they are quantised; `diffalign merge` first"
        ),
    )
    options.add_drawing(parser, solver=False)


def run(args: argparse.Namespace) -> None:
    """Quantise a model, save the copy, and print its size and speed."""
    from diffalign.cli.models import (
        calibration_drawing,
        chosen_prompts,
        dtype_of,
        load,
        settle_drawing,
    )
    from diffalign.cli.output import emit, suggest
    from diffalign.core import console
    from diffalign.tuning.smaller import SmallerSettings, make_smaller

    prompts = chosen_prompts(args) if args.prompts else None
    settings = SmallerSettings(
        args.backend, args.components, args.group_size, args.svd_rank, args.latency
    )
    settings.check(prompts)
    settle_drawing(args)
    with console.steps("quantize", ("load", "quantise", "save and measure")) as step:
        model = load(args)
        step()
        smaller = make_smaller(
            model,
            args.model,
            settings,
            args.output_dir,
            drawing=calibration_drawing(args, mixed_precision="bf16"),
            dtype=dtype_of(args),
            prompts=prompts,
            progress=step,
        )
    print(smaller.weights)
    if smaller.speed is not None:
        print(smaller.speed)
    size = f"{smaller.part} of {smaller.result['disk_bytes']:,} bytes"
    print(f"{args.output_dir}: {size}; diffalign.load reads it")
    suggest("generate", "a photo of a red circle", "--model", args.output_dir)
    emit(smaller.result)


VERB = Verb(
    "quantize",
    "save a smaller copy of a model, with 8 or 4 bits per weight",
    add_flags,
    run,
    description="Quantise a model's denoiser and save a folder that `diffalign.load` and every verb read "
    "(docs/qsched.md).\nPrints its size in memory and on disk, and the time of a forward pass beside the original's.",
    epilog="""example:
  diffalign quantize --model shapes-flux-schnell --backend int4 --svd_rank 16 --output_dir runs/small""",
)
