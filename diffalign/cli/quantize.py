"""`diffalign quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli import options, types
from diffalign.cli.flags import SampleFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb
from diffalign.quantization.backends import BACKENDS

if TYPE_CHECKING:
    from diffalign.data.prompts import Prompt
    from diffalign.tuning.quantising import SmallerSettings
    from diffalign.tuning.smaller import Smaller

ROUNDINGS = ("gptq", "nearest")
LAYOUTS = ("diffalign", "svdquant-int4", "svdquant-nvfp4")


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `quantize`."""

    backend: str
    output_dir: Path
    components: list[str]
    group_size: int
    svd_rank: int
    latency: int
    rounding: str | None
    calibration_memory: float
    tune_steps: int | None
    bits_per_weight: float | None
    layout: str


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
    options.add_calibration(parser, 32)
    _add_rounding(parser)
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="svdquant-int4 (of --backend int4) and svdquant-nvfp4 save what diffusers' 4-bit kernels read "
        "(nunchaku_lite), with --svd_rank 16, 32, ... (default: %(default)s)",
    )
    options.add_count(
        parser,
        "--latency",
        1,
        "batch size of the forward pass that is timed beside bfloat16; 0: time nothing",
        low=0,
    )
    options.add_whole_model(
        parser,
        "the LoRA has to be in the weights before they are quantised; `diffalign merge` first",
    )


def _add_rounding(parser: Parser) -> None:
    """Add the flags of rounding, bits and tuning."""
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default=None,
        help="gptq: the layers' outputs err least on --prompts; nearest: every weight errs least (default: gptq for "
        "packed weights with --prompts, else nearest)",
    )
    parser.add_argument(
        "--calibration_memory",
        type=types.number(above=0),
        default=4.0,
        metavar="GIB",
        help="memory for the statistics of gptq; the prompts are drawn again for what does not fit "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--bits_per_weight",
        type=types.number(2),
        default=None,
        metavar="BITS",
        help="mean of the packed weights' bits, scales included, which sets the bits of each layer (backend mixed)",
    )
    options.add_count(
        parser,
        "--tune_steps",
        None,
        "updates of packed weights' scales on the original model's predictions (default: 60 for int2, else 0)",
        low=0,
    )


def run(flags: Flags) -> None:
    """Quantise a model, save the copy, and print its size and speed."""
    from diffalign.cli.models import chosen_prompts, settle_drawing
    from diffalign.cli.output import emit, suggest
    from diffalign.tuning.quantising import SmallerSettings

    prompts = chosen_prompts(flags) if flags.prompts else None
    settings = SmallerSettings(
        flags.backend,
        flags.components,
        flags.group_size,
        flags.svd_rank,
        flags.latency,
        rounding=flags.rounding,
        calibration_memory=flags.calibration_memory,
        tune_steps=flags.tune_steps,
        bits_per_weight=flags.bits_per_weight,
        layout=flags.layout,
    )
    settings.check(prompts)
    settle_drawing(flags)
    smaller = _quantize(flags, settings, prompts)
    print(smaller.weights)
    if smaller.speed is not None:
        print(smaller.speed)
    if "psnr" in smaller.result:
        print(f"{smaller.result['psnr']:.1f} dB of PSNR to the original's images of the same noise")
    size = f"{smaller.part} of {smaller.result['disk_bytes']:,} bytes"
    if settings.precision is not None:
        print(f"{flags.output_dir}: {size}; diffusers reads it where its 4-bit kernels run")
        emit(smaller.result)
        return
    print(f"{flags.output_dir}: {size}; diffalign.load reads it")
    suggest("generate", "a photo of a red circle", "--model", flags.output_dir)
    emit(smaller.result)


def _quantize(flags: Flags, settings: SmallerSettings, prompts: list[Prompt] | None) -> Smaller:
    """Load, quantise and save the model, with a line for each step."""
    from diffalign.cli.models import drawing, dtype_of, load
    from diffalign.core import console
    from diffalign.tuning.smaller import make_smaller

    with console.steps("quantize", ("load", "quantise", "save and measure")) as step:
        model = load(flags)
        step()
        return make_smaller(
            model,
            flags.model,
            settings,
            flags.output_dir,
            drawing=drawing(flags, mixed_precision="bf16"),
            dtype=dtype_of(flags),
            prompts=prompts,
            progress=step,
        )


VERB = Verb(
    "quantize",
    "save a smaller copy of a model, with 8 or 4 bits per weight",
    add_flags,
    run,
    description="Quantise a model's denoiser and save a folder that `diffalign.load` and every verb read "
    "(docs/qsched.md).\nPrints its size in memory and on disk, and the time of a forward pass beside the original's.",
    epilog="""example:
  diffalign quantize --model shapes-flux-schnell --backend int4 --svd_rank 16 --output_dir runs/small""",
    flags=Flags,
)
