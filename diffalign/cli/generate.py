"""`diffalign generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.flags import DrawingFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(DrawingFlags):
    """Values of the flags of `generate`."""

    prompts: list[str]
    output_dir: Path


def add_flags(parser: Parser) -> None:
    """Add the flags of `generate`."""
    parser.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help="text, or a .txt or .jsonl file with one per line",
    )
    options.add_output_dir(parser, "runs/images", "folder of the images")
    options.add_count(parser, "--images_per_prompt", 4, "images of each prompt")
    options.add_model(parser)
    options.add_drawing(parser)


def run(flags: Flags) -> None:
    """Write every image as PNG when it is generated, then a grid of all."""
    from diffalign.cli.models import drawing, load, settle_drawing
    from diffalign.cli.output import emit, suggest
    from diffalign.core import console
    from diffalign.data.prompts import read_arguments
    from diffalign.evaluation.images import GRID, write_images

    prompts = read_arguments(flags.prompts)
    settle_drawing(flags)
    with console.counting("images") as progress:
        files = write_images(
            load(flags),
            prompts,
            flags.output_dir,
            drawing(flags),
            progress=progress,
        )
    print(f"{len(files)} images in {flags.output_dir}, all of them in {flags.output_dir / GRID}")
    reward = "verifier" if flags.model.startswith("shapes-") else "clip_score"
    suggest("evaluate", "rewards", "--images", flags.output_dir, "--rewards", reward)
    emit({"folder": str(flags.output_dir), "images": [str(f) for f in files]})


VERB = Verb(
    "generate",
    "make images of prompts with a model, with or without a LoRA",
    add_flags,
    run,
    epilog="""examples:
  diffalign generate "a photo of a red circle" --model shapes-sd3 --lora runs/demo/lora
  diffalign generate prompts.txt --images_per_prompt 1 --output_dir runs/images""",
    flags=Flags,
)
