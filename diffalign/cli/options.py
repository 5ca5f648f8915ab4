"""Groups of flags that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.cli import types
from diffalign.cli.parser import Parser

BATCH_SIZE = 64
"""Default number of images per batch for scoring."""
DTYPES = ("bfloat16", "float16", "float32")


def add_screen(parser: Parser, *, results: bool) -> None:
    """Add --verbose, and --json for verbs with results."""
    group = parser.add_argument_group("output on the screen")
    group.add_argument(
        "-v",
        "--verbose",
        "--debug",
        action="store_true",
        help="show the messages and progress bars of other libraries, and tracebacks of errors",
    )
    if results:
        group.add_argument(
            "--json",
            action="store_true",
            help="print only the result, as one line of JSON, to standard output",
        )


def add_model(
    parser: Parser,
    *,
    lora: Callable[[str], str] = types.lora,
    required_lora: bool = False,
) -> None:
    """Add --model, --lora and --dtype.

    Args:
        lora: type of the value of --lora.
        required_lora: make --lora mandatory.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=types.model,
        default="shapes-sd3",
        help="name from `diffalign list models`, folder, .safetensors file or hub id (owner/name@revision) "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--lora",
        type=lora,
        default=None,
        required=required_lora,
        help="LoRA to apply: folder, .safetensors file, or hub id with an optional :FILE"
        if lora is types.lora
        else argparse.SUPPRESS,
    )
    group.add_argument(
        "--dtype",
        default=None,
        choices=DTYPES,
        help="number format of the weights (default: that of the model's card)",
    )


def add_drawing(parser: Parser, *, solver: bool = True) -> None:
    """Add the flags of image generation.

    The model's card completes flags that are not set (`models.settle_drawing`).

    Args:
        solver: add --solver, which replaces the model's own solver.
    """
    group = parser.add_argument_group("how images are drawn")
    add_steps(group)
    if solver:
        group.add_argument(
            "--solver",
            default="default",
            choices=("default", "adams_bashforth"),
            help="solver of the sampling ODE: the model's own scheduler, or second-order Adams-Bashforth (docs/awm.md)",
        )
    add_guidance(group)
    for side in ("height", "width"):
        group.add_argument(
            f"--{side}",
            type=types.count(),
            default=None,
            metavar="PIXELS",
            help=f"{side} of the images in pixels (default: the model's own)",
        )
    group.add_argument(
        "--seed", type=types.seed, default=1000, help="random seed (default: %(default)s)"
    )
    group.add_argument(
        "--batch_size",
        type=types.count(),
        default=None,
        metavar="N",
        help="images per batch; lower it if memory runs out (default: that of the model's card)",
    )


def add_call(group: argparse._ActionsContainer) -> None:
    """Add --num_inference_steps and --guidance_scale."""
    add_steps(group)
    add_guidance(group)


def add_steps(group: argparse._ActionsContainer) -> None:
    """Add --num_inference_steps."""
    group.add_argument(
        "--num_inference_steps",
        type=types.count(),
        default=None,
        metavar="N",
        help="denoising steps per image (default: that of the model's card)",
    )


def add_guidance(group: argparse._ActionsContainer) -> None:
    """Add --guidance_scale."""
    group.add_argument(
        "--guidance_scale",
        type=types.number(0),
        default=None,
        metavar="W",
        help="strength of classifier-free guidance; 1 is none (default: that of the model's card)",
    )


def add_batch_size(parser: argparse._ActionsContainer) -> None:
    """Add --batch_size."""
    text = "images per batch; lower it if memory runs out"
    add_count(parser, "--batch_size", BATCH_SIZE, text)


def add_count(
    parser: argparse._ActionsContainer, flag: str, default: int | None, text: str, *, low: int = 1
) -> None:
    """Add a flag whose value is a whole number of at least `low`."""
    help_text = text if default is None else f"{text} (default: %(default)s)"
    parser.add_argument(flag, type=types.count(low), default=default, metavar="N", help=help_text)


def add_images(parser: Parser, *, text: str | None = None) -> None:
    """Add --images."""
    parser.add_argument(
        "--images",
        type=types.input_folder,
        default=None,
        metavar="DIR",
        help=text
        or "folder of images, with captions where the rewards need them (docs/rewards.md)",
    )


def add_prompts(parser: Parser, default: str | None, **more: Any) -> None:
    """Add --prompts."""
    parser.add_argument(
        "--prompts",
        type=types.place,
        default=default,
        help="shapes:train, shapes:held_out, geneval, or a .txt or .jsonl file"
        + (f" (default: {default})" if default else ""),
        **more,
    )


def add_calibration(parser: Parser, number: int, *, required: bool = False) -> None:
    """Add --prompts and --max_prompts of verbs that calibrate a model on some prompts.

    Args:
        number: default of --max_prompts.
        required: make --prompts mandatory.
    """
    add_prompts(parser, None, required=required)
    add_count(parser, "--max_prompts", number, "use only N of the prompts")


def add_held_out(parser: Parser) -> None:
    """Add --held_out of verbs that accept the result of a search on other prompts."""
    parser.add_argument(
        "--held_out",
        type=types.number(above=0, high=1),
        default=0.5,
        metavar="SHARE",
        help="share of the prompts that are kept for accepting the result (default: %(default)s)",
    )


def add_whole_model(parser: Parser, reason: str) -> None:
    """Add the flags of a model without adapters, and of its images.

    Args:
        reason: reason why --lora is refused.
    """
    add_model(parser, lora=types.refused(reason))
    add_drawing(parser, solver=False)


def add_rewards(parser: Parser, default: str | None = "verifier") -> None:
    """Add --rewards."""
    parser.add_argument(
        "--rewards",
        type=types.names,
        default=default,
        metavar="NAME,...",
        help=f"names from `diffalign list rewards`, separated by commas (default: {default or 'none'})",
    )


def add_output(parser: Parser) -> None:
    """Add --output, the file of an evaluation's result."""
    parser.add_argument(
        "--output",
        type=types.output_file,
        default=None,
        metavar="FILE",
        help="write the result to this JSON file",
    )


def add_output_dir(
    parser: Parser,
    default: str | None,
    text: str,
    *,
    kind: Callable[[str], Path] = types.output_folder,
) -> None:
    """Add --output_dir, whose type `kind` checks the folder."""
    parser.add_argument(
        "--output_dir",
        type=kind,
        default=default,
        required=default is None,
        metavar="DIR",
        help=text if default is None else f"{text} (default: %(default)s)",
    )
