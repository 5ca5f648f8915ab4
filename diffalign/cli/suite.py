"""`diffalign evaluate suite`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options, types
from diffalign.cli.flags import SampleFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

DEFAULT = "geneval2,unigenbench,longtext,preference"
SHAPES = "shapes:checklist,shapes:rubric,shapes:preference"


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `evaluate suite`."""

    prompts: str = ""
    benchmarks: list[str] | None
    judge: str | None
    rewards: list[str] | None
    features: str | None
    data: Path | None
    allow_other_data: bool
    variant: str
    quick: int | None
    against: str | None
    images: Path | None
    export: Path | None
    output_dir: Path
    no_chance: bool
    trust_judge: bool
    output: Path | None


def add_flags(parser: Parser) -> None:
    """Add the flags of `evaluate suite`."""
    _add_judging(parser)
    parser.add_argument(
        "--quick",
        type=types.count(),
        nargs="?",
        const=0,
        default=None,
        metavar="N",
        help="use N prompts of each benchmark, spread evenly (without a number: an eighth)",
    )
    parser.add_argument(
        "--against",
        type=types.place,
        default=None,
        metavar="base|DIR",
        help="compare with the model without its LoRA, or with another suite's folder",
    )
    options.add_images(
        parser, text="score these images, one folder in GenEval's layout for each benchmark"
    )
    parser.add_argument(
        "--export",
        type=types.output_folder,
        default=None,
        metavar="DIR",
        help="write the images in the layouts that the official scripts read",
    )
    options.add_count(
        parser, "--images_per_prompt", None, "images of each prompt (default: the benchmark's own)"
    )
    options.add_output_dir(parser, "runs/suite", "folder of the suite; the same command resumes it")
    options.add_output(parser)
    options.add_model(parser)
    options.add_drawing(parser)


def _add_judging(parser: Parser) -> None:
    """Add the flags that say what is asked, of whom, and by which rule."""
    parser.add_argument(
        "--benchmarks",
        type=types.names,
        default=None,
        metavar="NAME,...",
        help=f"names from `diffalign list benchmarks` (default: {DEFAULT}; for shapes-* models {SHAPES})",
    )
    parser.add_argument(
        "--judge",
        type=types.place,
        default=None,
        metavar="NAME",
        help="exact, recorded, URL#MODEL, a folder or a hub id (default: each benchmark's official judge)",
    )
    options.add_rewards(parser, None)
    parser.add_argument(
        "--features",
        default=None,
        metavar="NETWORK",
        help="network of the diversity (default: dinov2; for shapes-* models shapes_clip)",
    )
    parser.add_argument(
        "--data",
        type=types.input_folder,
        default=None,
        metavar="DIR",
        help="folder with the benchmarks' files (default: download them at their pinned commits)",
    )
    parser.add_argument(
        "--allow_other_data",
        action="store_true",
        help="accept files other than the published ones, and say so in the result",
    )
    parser.add_argument(
        "--variant",
        default="official",
        choices=("official", "corrected"),
        help="rule: as released, or without the release's errors (default: %(default)s)",
    )
    parser.add_argument("--no_chance", action="store_true", help="leave out the chance line")
    parser.add_argument(
        "--trust_judge",
        action="store_true",
        help="go on with a judge that fails the questions with known answers",
    )


def run(flags: Flags) -> None:
    """Run benchmarks on a model or on images, and write figures and a page."""
    from diffalign.cli.suites import run_suite

    run_suite(flags)


VERB = Verb(
    "suite",
    "run benchmarks that ask a judge, with intervals, a base to compare with, and a page",
    add_flags,
    run,
    shares=True,
    resumes=True,
    flags=Flags,
)
