"""`diffalign convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import types
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `convert`."""

    lora: str
    to: str
    family: str | None
    output: Path


def add_flags(parser: Parser) -> None:
    """Add the flags of `convert`."""
    parser.add_argument(
        "lora",
        type=types.lora,
        help="LoRA to convert: folder, .safetensors file, or hub id with an optional :FILE",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("diffusers", "comfyui", "kohya"),
        help="program that is to read the file",
    )
    parser.add_argument(
        "--family",
        default=None,
        choices=("flux", "flux2", "qwen_image", "sd3", "z_image"),
        help="family of the model; needed for the transformers of kohya's files",
    )
    parser.add_argument(
        "--output", type=types.output_file, required=True, metavar="FILE", help="file to write"
    )


def run(flags: Flags) -> None:
    """Rewrite a LoRA file."""
    from diffalign.cli.output import emit, suggest
    from diffalign.core.files import aside
    from diffalign.lora.files import read_lora
    from diffalign.lora.formats import write

    lora = read_lora(flags.lora)
    with aside(flags.output) as file:
        write(lora, file, to=flags.to, family=flags.family)
    print(f"{flags.output}: {len(lora)} modules in {flags.to}'s keys")
    if flags.to == "diffusers":
        suggest("generate", "a photo of a red circle", "--model", "MODEL", "--lora", flags.output)
    else:
        print(f"next: load {flags.output} in the program, with strength 1")
    emit({"file": str(flags.output), "modules": len(lora), "to": flags.to})


VERB = Verb(
    "convert",
    "convert a LoRA file between diffusers, ComfyUI and kohya",
    add_flags,
    run,
    epilog="""example:
  diffalign convert runs/demo/lora --to comfyui --output demo.safetensors""",
    flags=Flags,
)
