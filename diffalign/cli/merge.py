"""`diffalign merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli.options import DTYPES
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `merge`."""
    parser.add_argument("--model", default="shapes-sd3", help="as of generate")
    parser.add_argument(
        "--lora", required=True, help="folder, file or hub id; behind a colon the file in it"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument(
        "--scheduler",
        default=None,
        help="of a distilled student: its run's scheduler/, or a class such as LCMScheduler or "
        "TCDScheduler,timestep_spacing=trailing",
    )
    parser.add_argument(
        "--fold_guidance",
        type=float,
        default=None,
        help="of FLUX: for this guidance scale alone, in FLUX.1-schnell's layout",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="must not exist yet")


def run(args: argparse.Namespace) -> None:
    """Save a pipeline whose weights hold the LoRA: it loads and runs without adapters, at the base's speed."""
    from diffalign.cli.models import load
    from diffalign.core.errors import UsageError
    from diffalign.core.files import folder_aside
    from diffalign.lora.files import read_lora
    from diffalign.pipelines.merging import merge, merged_card
    from diffalign.pipelines.saving import save_pipeline

    if args.output_dir.exists():
        raise UsageError(f"--output_dir: {args.output_dir} exists already")
    card = merged_card(args.model, scheduler=args.scheduler, guidance=args.fold_guidance)
    lora = read_lora(args.lora)
    pipeline = load(args, adapters=False).pipeline
    merge(pipeline, lora, scheduler=args.scheduler, guidance=args.fold_guidance)
    with folder_aside(args.output_dir) as folder:
        save_pipeline(pipeline, folder, card=card)
    print(f"{args.output_dir}: {args.model} with {args.lora} in its weights")


VERB = Verb("merge", "a whole pipeline with a LoRA added into its weights", add_flags, run)
