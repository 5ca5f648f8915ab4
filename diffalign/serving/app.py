"""Web application of a server of images, with OpenAI's images API."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from diffalign.serving import answers
from diffalign.serving.engine import Closing, Engine, QueueFull
from diffalign.serving.fields import Bounds, Defaults, FieldError, Fields, Question
from diffalign.serving.metrics import Metrics
from diffalign.serving.tickets import Failed, Finished, Partial, Report, Ticket
from diffalign.web.admission import Refusal, admit

MAX_BYTES = 1_000_000
"""Largest request in bytes; a request is text only."""
UPLOAD_SECONDS = 30.0
"""Time limit of receiving a request."""
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
POLICY += "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
"""Content security policy of the page, which loads nothing from elsewhere."""
NEVER_AGAIN = {"x-should-retry": "false"}
"""Header that keeps OpenAI's client from repeating a request."""


@dataclass
class Service:
    """Engine of an application, and the settings of its answers.

    Attributes:
        token: token that `Authorization: Bearer ...` must carry; None requires no token.
        timeout: seconds from a request to its last image.
        report: description of the acceleration, values of JSON.
        page: whether the page is served.
        is_ready: True after the warm-up.
    """

    engine: Engine
    metrics: Metrics
    defaults: Defaults
    bounds: Bounds = field(default_factory=Bounds)
    token: str | None = None
    timeout: float = 120.0
    report: Mapping[str, Any] = field(default_factory=dict)
    page: bool = False
    is_ready: bool = False
    started: int = field(default_factory=lambda: int(time.time()))


def build_app(service: Service) -> FastAPI:
    """Return the web application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # images in progress are finished before the process ends
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(
        title="diffalign", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    answerer = _Answers(service)
    _add_errors(app, service.metrics)
    for path, answer in answerer.routes().items():
        app.get(path)(answer)
    app.post("/v1/images/generations")(answerer.generate)
    for path in ("/v1/images/edits", "/v1/images/variations"):
        app.post(path)(answerer.no_edits)
    return app


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error in OpenAI's form."""

    def answer(status: int, text: str, **more: Any) -> JSONResponse:
        metrics.requests.labels(str(status)).inc()
        headers = more.pop("headers", None)
        return JSONResponse(answers.error(status, text, **more), status, headers=headers)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> JSONResponse:
        return answer(refusal.status, refusal.text)

    @app.exception_handler(HTTPException)
    async def explain(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(FieldError)
    async def name(_: Request, error: FieldError) -> JSONResponse:
        status = 404 if error.code.endswith("not_found") else 400
        return answer(status, str(error), param=error.param, code=error.code)

    @app.exception_handler(QueueFull)
    async def delay(_: Request, error: QueueFull) -> JSONResponse:
        headers = {"retry-after": f"{error.seconds:.0f}"}
        return answer(429, str(error), code="queue_full", headers=headers)

    @app.exception_handler(Closing)
    async def close(_: Request, error: Closing) -> JSONResponse:
        return answer(503, str(error), code="shutdown")

    @app.exception_handler(_Undrawn)
    async def tell(_: Request, error: _Undrawn) -> JSONResponse:
        cause = error.failure.cause
        headers = None if cause in answers.AGAIN else NEVER_AGAIN
        status = answers.STATUSES.get(cause, 500)
        return answer(status, error.failure.text, code=cause, headers=headers)


class _Undrawn(Exception):
    """Image that the engine could not draw."""

    def __init__(self, failure: Failed) -> None:
        super().__init__(failure.text)
        self.failure = failure


class _Answers:
    """Answers to the requests of clients."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._fields = Fields(service.engine, service.defaults, service.bounds)
        # a tokenizer of its own: a call changes its padding, while the engine's thread encodes prompts
        pipeline = service.engine.model.pipeline
        self._tokenizer = copy.deepcopy(getattr(pipeline, "tokenizer", None))

    def routes(self) -> dict[str, Callable[..., Any]]:
        """Return the answers to GET by path."""
        routes: dict[str, Callable[..., Any]] = {
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/acceleration": self.acceleration,
            "/v1/models": self.models,
            "/v1/loras": self.loras,
        }
        return routes | ({"/": self.page} if self._service.page else {})

    async def health(self) -> Response:
        """Answer whether the engine lives; no token is needed."""
        alive = self._service.engine.is_alive or not self._service.is_ready
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def ready(self) -> Response:
        """Answer whether the declared sizes are warm; no token is needed."""
        ready = self._service.is_ready and self._service.engine.is_alive
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Answer with Prometheus' metrics."""
        self._admit(request)
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def acceleration(self, request: Request) -> Response:
        """Answer with the modes, and the report of the acceleration."""
        self._admit(request)
        return JSONResponse(dict(self._service.report))

    async def models(self, request: Request) -> Response:
        """Answer with the model, in OpenAI's form."""
        self._admit(request)
        model = {"object": "model", "created": self._service.started, "owned_by": "diffalign"}
        names = self._service.defaults.names
        return JSONResponse({"object": "list", "data": [{"id": names[0], **model}]})

    async def loras(self, request: Request) -> Response:
        """Answer with the names of the LoRAs."""
        self._admit(request)
        names = self._service.engine.loras.names
        return JSONResponse(
            {"object": "list", "data": [{"id": n, "object": "lora"} for n in names]}
        )

    async def page(self) -> Response:
        """Answer with the page; it holds no secret, and asks for the token."""
        text = files("diffalign.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": POLICY})

    async def no_edits(self, request: Request) -> Response:
        """Refuse to edit images."""
        self._admit(request)
        raise Refusal(400, "this server draws images of texts; it does not edit images")

    async def generate(self, request: Request) -> Response:
        """Answer with images, or with a stream of events."""
        self._admit(request)
        question = self._fields.read(await _body(request))
        reports: asyncio.Queue[tuple[int, Report]] = asyncio.Queue()
        tickets = self._tickets(question, reports)
        # an image of many rows is refused before any of them is drawn
        self._service.engine.submit(tickets)
        if question.stream:
            self._service.metrics.requests.labels("200").inc()
            stream = self._stream(question, tickets, reports)
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        try:
            images = await self._unless_gone(request, self._all(question, tickets, reports))
        finally:
            _cancel(tickets)
        self._service.metrics.requests.labels("200").inc()
        return JSONResponse(answers.whole(question, images, self._usage(question)))

    def _admit(self, request: Request) -> None:
        admit(request.headers, self._service.token)

    def _tickets(
        self, question: Question, reports: asyncio.Queue[tuple[int, Report]]
    ) -> list[Ticket]:
        """Return a ticket for each image, whose reports go into the queue."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self._service.timeout

        def listener(number: int) -> Callable[[Report], None]:
            def listen(report: Report) -> None:
                # the loop of a server that was stopped is closed
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(reports.put_nowait, (number, report))

            return listen

        return [Ticket(w, listener(i), deadline) for i, w in enumerate(question.images)]

    async def _all(
        self,
        question: Question,
        tickets: list[Ticket],
        reports: asyncio.Queue[tuple[int, Report]],
    ) -> list[dict[str, Any]]:
        """Return all images of a request, in order."""
        images: dict[int, dict[str, Any]] = {}
        while len(images) < len(tickets):
            number, report = await reports.get()
            if isinstance(report, Failed):
                raise _Undrawn(report)
            if isinstance(report, Finished):
                images[number] = await self._content(question, number, report)
        return [images[i] for i in range(len(tickets))]

    async def _stream(
        self,
        question: Question,
        tickets: list[Ticket],
        reports: asyncio.Queue[tuple[int, Report]],
    ) -> AsyncIterator[bytes]:
        """Yield the events of a request."""
        left = len(tickets)
        try:
            tokens = self._usage(question)
            while left:
                number, report = await reports.get()
                if isinstance(report, Failed):
                    status = answers.STATUSES.get(report.cause, 500)
                    yield answers.error_event(status, report.text, code=report.cause)
                    return
                if isinstance(report, Partial):
                    content = {
                        "b64_json": await asyncio.to_thread(
                            answers.picture, report.image, question
                        ),
                        "partial_image_index": report.index,
                        "image_index": number,
                    }
                    yield answers.event("partial_image", question, content)
                    continue
                left -= 1
                content = await self._content(question, number, report)
                content |= {"image_index": number, "usage": tokens}
                yield answers.event("completed", question, content)
        finally:
            # a client that is gone ends the generator
            _cancel(tickets)

    async def _content(self, question: Question, number: int, image: Finished) -> dict[str, Any]:
        text = await asyncio.to_thread(answers.picture, image.image, question)
        return {
            "b64_json": text,
            "seed": question.images[number].seed,
            "seconds": round(image.seconds - image.queue_seconds, 4),
            "queue_seconds": round(image.queue_seconds, 4),
            "steps": {"computed": image.computed, "skipped": image.skipped},
            "waited_steps": image.rounds,
        }

    async def _unless_gone(self, request: Request, work: Any) -> Any:
        """Return the result of a coroutine, unless the client leaves before.

        Raises:
            Refusal: 499, which nobody reads.
        """
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Refusal(499, "the client closed the connection")
            return working.result()
        finally:
            working.cancel()
            leaving.cancel()

    def _usage(self, question: Question) -> dict[str, Any]:
        """Return the tokens of the prompt, and of all images of the answer."""
        model, first = self._service.engine.model, question.images[0]
        tokenizer = self._tokenizer
        # a long prompt has a warning of its own in transformers, about a length that does not matter here
        text = tokenizer.tokenize(first.prompt) if tokenizer is not None else first.prompt.split()
        return answers.usage(len(text), model.image_seq_len(first.size) * len(question.images))


def _cancel(tickets: list[Ticket]) -> None:
    """Free the rows of images that nobody waits for any more."""
    for ticket in tickets:
        ticket.cancel("disconnect")


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> Any:
    """Return the JSON of a request.

    Raises:
        Refusal: the request is no JSON, too large or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # a form of another site cannot send this type
    if kind != "application/json":
        raise Refusal(415, "the content-type must be application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MAX_BYTES:
                    raise Refusal(413, f"a request may have {MAX_BYTES} bytes")
    except TimeoutError as error:
        raise Refusal(408, f"the request did not arrive within {UPLOAD_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise Refusal(400, "the request ended before its body") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON") from error
