"""`diffalign serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options, types
from diffalign.cli.flags import ModelFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb
from diffalign.types import Size


@dataclass(kw_only=True)
class Flags(ModelFlags):
    """Values of the flags of `serve`."""

    num_inference_steps: int
    """Steps of a request that names none; None until the model's card is read."""
    guidance_scale: float | None
    host: str
    port: int
    preset: list[str] | None
    max_batch: int
    max_wait_ms: float
    queue: int
    timeout: float
    deterministic: bool
    loras: Path | None
    ui: bool
    sizes: list[Size] | None
    max_pixels: int
    max_steps: int


def add_flags(parser: Parser) -> None:
    """Add the flags of `serve`."""
    parser.add_argument(
        "--preset",
        type=types.names,
        default=None,
        metavar="NAME,...",
        help="presets of `diffalign list presets`, the default first; a request chooses by `quality` (default: the "
        "folder's plan, else none)",
    )
    _add_listening(parser)
    _add_bounds(parser)
    options.add_model(parser)
    options.add_call(parser.add_argument_group("what a request may leave out"))


def _add_listening(parser: Parser) -> None:
    """Add the flags of the address, the LoRAs and the page."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but the default needs a token in DIFFALIGN_TOKEN (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=types.count(0),
        default=8000,
        help="port to listen on; 0: any that is free (default: %(default)s)",
    )
    parser.add_argument(
        "--loras",
        type=types.input_folder,
        default=None,
        metavar="DIR",
        help="folder of the LoRAs that a request may name",
    )
    parser.add_argument("--ui", action="store_true", help="serve a page to try the model")


def _add_bounds(parser: Parser) -> None:
    """Add the flags of batches and limits."""
    options.add_count(parser, "--max_batch", 8, "largest number of images in progress")
    parser.add_argument(
        "--max_wait_ms",
        type=types.number(0),
        default=15.0,
        metavar="MS",
        help="time that an idle server waits for company before the first step (default: %(default)s)",
    )
    options.add_count(parser, "--queue", 64, "images that wait; beyond it a request is refused")
    parser.add_argument(
        "--timeout",
        type=types.number(above=0),
        default=120.0,
        metavar="SECONDS",
        help="time from a request to its last image (default: %(default)s)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="draw every image to the same bit in any company, without shared forwards",
    )
    parser.add_argument(
        "--sizes",
        type=types.sizes,
        default=None,
        metavar="WxH,...",
        help="sizes that are warm before the server is ready, the default first (default: the model's own)",
    )
    options.add_count(parser, "--max_pixels", 2048 * 2048, "largest image in pixels")
    options.add_count(parser, "--max_steps", 200, "largest number of steps of a request")


def run(flags: Flags) -> None:
    """Serve images until interrupted.

    If DIFFALIGN_TOKEN is set, clients must send it as their token.
    """
    from diffalign.cli.models import load, settle_drawing
    from diffalign.core import console
    from diffalign.serving.start import Call, ServerSettings, serve

    settle_drawing(flags)
    settings = ServerSettings(
        flags.host,
        flags.port,
        tuple(flags.preset or ()),
        flags.max_batch,
        flags.max_wait_ms,
        flags.queue,
        flags.timeout,
        flags.deterministic,
        flags.loras,
        flags.ui,
        tuple(flags.sizes or ()),
        flags.max_pixels,
        flags.max_steps,
        mixed_precision="bf16" if flags.dtype == "bfloat16" else "no",
    )
    call = Call(flags.model, flags.num_inference_steps, flags.guidance_scale)
    serve(settings, call, lambda: load(flags), say=console.say)


VERB = Verb(
    "serve",
    "serve images over HTTP, as OpenAI's images API asks for them (docs/serving.md)",
    add_flags,
    run,
    has_result=False,
    epilog="""example:
  diffalign serve --model shapes-sd3 --preset balanced --port 8000 --ui""",
    flags=Flags,
)
