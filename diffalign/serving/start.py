"""Start of a server of images: check the settings, load the model, warm it up, listen."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.acceleration.options import check_preset
from diffalign.core.errors import UsageError
from diffalign.types import Size
from diffalign.web.listening import address_of, listen, read_token

if TYPE_CHECKING:
    import uvicorn

    from diffalign.acceleration.report import Acceleration
    from diffalign.pipelines.base import TextToImageModel
    from diffalign.serving.app import Service
    from diffalign.serving.modes import Mode

TOKEN = "DIFFALIGN_TOKEN"
"""Environment variable of the token."""
GRACE = 60
"""Seconds in which a server that is stopped finishes its images."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 is any that is free.
        presets: presets of `accelerate`, the default first.
        max_batch: largest number of images in progress.
        max_wait_ms: milliseconds that an idle server waits for company before the first step.
        queue: largest number of images that wait.
        timeout: seconds from a request to its last image.
        deterministic: draw every image to the same bit in any company.
        loras: folder of the LoRAs that a request may name.
        ui: serve the page.
        sizes: sizes (height, width) that are warm before the server is ready; empty for the model's own.
        max_pixels: largest number of pixels of an image.
        max_steps: largest number of steps.
        mixed_precision: "bf16" (autocast) or "no".
    """

    host: str = "127.0.0.1"
    port: int = 8000
    presets: tuple[str, ...] = ()
    max_batch: int = 8
    max_wait_ms: float = 15.0
    queue: int = 64
    timeout: float = 120.0
    deterministic: bool = False
    loras: Path | None = None
    ui: bool = False
    sizes: tuple[Size, ...] = ()
    max_pixels: int = 2048 * 2048
    max_steps: int = 200
    mixed_precision: str = "no"


@dataclass(frozen=True)
class Call:
    """Settings of a call that requests leave to the server."""

    name: str
    num_inference_steps: int
    guidance_scale: float | None


def serve(
    settings: ServerSettings,
    call: Call,
    load: Callable[[], TextToImageModel],
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a model until interrupted, and finish the images in progress then.

    If DIFFALIGN_TOKEN is set, clients must send it as their token.

    Args:
        load: loads the model after the settings were checked.
        say: receives the lines that tell what is in force.

    Raises:
        UsageError: the server could be reached from outside without a token, the port is taken, or the settings do not
            fit the model.
    """
    try:
        from diffalign.serving.app import build_app
        from diffalign.web.connections import make_server
    except ModuleNotFoundError as error:
        raise UsageError(f"serve needs `pip install diffalign[server]`: {error}") from error
    token = read_token(TOKEN, host=settings.host)
    for preset in settings.presets:
        check_preset(preset)
    listening = listen(settings.host, settings.port)
    service = build_service(load(), settings, call, token=token)
    for line in lines_of(service):
        say(line)
    server = make_server(build_app(service), timeout_graceful_shutdown=GRACE)
    threading.Thread(target=_prepare, args=(service, settings, server, say), daemon=True).start()
    say(f"listening on {address_of(listening, settings.host)}")
    server.run(sockets=[listening])


def build_service(
    model: TextToImageModel, settings: ServerSettings, call: Call, *, token: str | None = None
) -> Service:
    """Return a service of a model whose engine is not started yet."""
    from diffalign.serving.app import Service
    from diffalign.serving.engine import Engine, EngineSettings
    from diffalign.serving.fields import Bounds, Defaults
    from diffalign.serving.loras import Loras
    from diffalign.serving.metrics import Metrics

    sizes = settings.sizes or (model.default_size,)
    modes, reports = _modes(model, settings, call, sizes)
    compiled = any("compile" in r.applied for r in reports[:1])
    metrics = Metrics(sizes)
    engine = Engine(
        model,
        EngineSettings(
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            queue=settings.queue,
            deterministic=settings.deterministic,
            buckets=buckets_of(settings) if compiled else (),
            mixed_precision=settings.mixed_precision,
        ),
        modes=modes,
        loras=Loras(model, settings.loras),
        observer=metrics,
    )
    metrics.watch(engine)
    names = dict.fromkeys([call.name, Path(call.name).name])
    return Service(
        engine,
        metrics,
        Defaults(tuple(names), sizes[0], call.num_inference_steps, call.guidance_scale),
        Bounds(pixels=settings.max_pixels, steps=settings.max_steps),
        token=token,
        timeout=settings.timeout,
        report=describe(engine, reports),
        page=settings.ui,
    )


def buckets_of(settings: ServerSettings) -> tuple[int, ...]:
    """Return the numbers of images in a forward for which blocks are compiled: powers of two."""
    if settings.deterministic:
        return (1,)
    powers = [2**i for i in range(settings.max_batch.bit_length())]
    return tuple(dict.fromkeys([*powers, settings.max_batch]))


def describe(engine: Any, reports: Sequence[Acceleration]) -> dict[str, Any]:
    """Return what is in force, as values of JSON."""
    settings = engine.settings
    return {
        "modes": {
            mode.name: {
                "cache": [{"steps": s.steps, "computed": len(s.computed)} for s in mode.schedules],
                "guidance": mode.guidance or "every step",
            }
            for mode in engine.modes.values()
        },
        "default": next(iter(engine.modes)),
        "max_batch": settings.max_batch,
        "queue": settings.queue,
        "deterministic": settings.deterministic,
        "rows": list(engine.batches.buckets) or "any number",
        "acceleration": [
            {
                "preset": r.preset,
                "applied": r.applied,
                "dropped": [
                    {"option": d.option, "why": d.why, "remedy": d.remedy} for d in r.dropped
                ],
                # JSON has no infinite numbers, such as the PSNR of equal images
                "measured": {k: v if math.isfinite(v) else None for k, v in r.measured.items()},
            }
            for r in reports
        ],
    }


def lines_of(service: Service) -> list[str]:
    """Return the lines that tell what is in force."""
    report, defaults = service.report, service.defaults
    height, width = defaults.size
    lines = [
        f"model {defaults.names[0]}: {width}x{height}, {defaults.num_inference_steps} steps",
        f"presets: {', '.join(report['modes'])}; default {report['default']}",
        f"at most {report['max_batch']} images at a time, {report['queue']} in the queue",
    ]
    if names := service.engine.loras.names:
        lines.append(f"LoRAs: {', '.join(names)}")
    if service.token is None:
        lines.append(f"no token: this machine only (set {TOKEN} to require one)")
    return lines


def _modes(
    model: TextToImageModel, settings: ServerSettings, call: Call, sizes: tuple[Size, ...]
) -> tuple[list[Mode], list[Acceleration]]:
    """Accelerate the pipeline, and return the modes and the reports."""
    from diffalign.acceleration.apply import accelerate
    from diffalign.acceleration.report import PLAN
    from diffalign.serving.modes import prepare

    for size in sizes:
        model.latent_shape(size)
    model.pipeline.set_progress_bar_config(disable=True)
    plan = Path(call.name).expanduser() / PLAN
    if not settings.presets and plan.is_file():
        accelerate(model.pipeline, plan)
    arguments = {} if call.guidance_scale is None else {"guidance_scale": call.guidance_scale}
    return prepare(
        model.pipeline,
        settings.presets,
        sizes=sizes,
        steps=call.num_inference_steps,
        arguments=arguments,
    )


def _prepare(
    service: Service, settings: ServerSettings, server: uvicorn.Server, say: Callable[[str], None]
) -> None:
    """Warm the engine up, and start it; a failure ends the server."""
    engine = service.engine
    try:
        sizes = settings.sizes or (service.defaults.size,)
        engine.warm_up(sizes, guidance_scale=service.defaults.guidance_scale)
    except Exception as error:
        say(f"the warm-up failed: {error}")
        server.should_exit = True
        return
    engine.start()
    service.is_ready = True
    say("ready")
