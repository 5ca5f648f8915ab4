"""`diffalign merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options, types
from diffalign.cli.flags import ModelFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(ModelFlags):
    """Values of the flags of `merge`."""

    lora: str
    scheduler: str | None
    fold_guidance: float | None
    output_dir: Path


def add_flags(parser: Parser) -> None:
    """Add the flags of `merge`."""
    options.add_model(parser, required_lora=True)
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument(
        "--scheduler",
        type=types.place,
        default=None,
        help="scheduler of the merged model: a distilled run's scheduler/ folder, or a class of diffusers such as "
        "LCMScheduler or TCDScheduler,timestep_spacing=trailing (default: the model's)",
    )
    parser.add_argument(
        "--fold_guidance",
        type=types.number(0),
        default=None,
        metavar="W",
        help="FLUX only: fix the guidance scale to W, which gives the layout of FLUX.1-schnell",
    )
    options.add_output_dir(parser, None, "new folder of the model", kind=types.new_folder)


def run(flags: Flags) -> None:
    """Save a pipeline with the LoRA merged into its weights.

    The pipeline loads and runs without adapters, at the speed of the base model.
    """
    from diffalign.cli.models import load
    from diffalign.cli.output import emit, suggest
    from diffalign.core import console
    from diffalign.core.files import folder_aside
    from diffalign.lora.files import read_lora
    from diffalign.pipelines.merging import merge, merged_card
    from diffalign.pipelines.saving import save_pipeline

    card = merged_card(flags.model, scheduler=flags.scheduler, guidance=flags.fold_guidance)
    lora = read_lora(flags.lora)
    with console.steps("merge", ("load", "merge", "save")) as step:
        pipeline = load(flags, adapters=False).pipeline
        step()
        merge(pipeline, lora, scheduler=flags.scheduler, fold_guidance=flags.fold_guidance)
        step()
        with folder_aside(flags.output_dir) as folder:
            save_pipeline(pipeline, folder, card=card)
        step()
    print(f"{flags.output_dir}: {flags.model} with {flags.lora} in its weights")
    suggest("generate", "a photo of a red circle", "--model", flags.output_dir)
    emit({"folder": str(flags.output_dir), "model": flags.model, "lora": flags.lora})


VERB = Verb(
    "merge",
    "save a model with a LoRA merged into its weights",
    add_flags,
    run,
    epilog="""example:
  diffalign merge --model shapes-sd3 --lora runs/demo/lora --output_dir runs/merged""",
    flags=Flags,
)
