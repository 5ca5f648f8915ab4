"""HTTP service for rewards that need their own GPU or environment.

Start it with this command:

    diffalign serve-rewards --rewards pickscore,ocr --port 8100

A recipe then has `rewards: {"remote:http://127.0.0.1:8100/pickscore": 1.0}`. GET /health names the rewards, and POST
/NAME scores images (`wire.encode_request`). By default the service listens on loopback and answers only requests to a
loopback host name. It can require a token. Requests are limited in bytes, time and number (`rewards.uploads`,
`web.connections`), and every request gets an answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from diffalign.core.errors import one_line
from diffalign.rewards import wire
from diffalign.rewards.base import Reward
from diffalign.rewards.function import RewardShapeError, as_output, score_all
from diffalign.rewards.uploads import Parsing, Question, Uploads
from diffalign.web.admission import Refusal, admit

logger = logging.getLogger(__name__)
LONGEST = 200
"""Largest number of characters of an error in the log."""


@dataclass
class Served:
    """Reward and its only thread, because models do not support concurrent use."""

    reward: Reward
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    waiting: int = 0
    golden: dict[str, Any] | None = None
    reported: set[str] = field(default_factory=set)

    def report(self, error: Exception, images: int) -> None:
        """Log each kind of failure once, in one line, so that the log stays short."""
        kind = type(error).__name__
        level = logging.DEBUG if kind in self.reported else logging.WARNING
        self.reported.add(kind)
        reason = one_line(error, limit=LONGEST)
        logger.log(
            level, "%s failed on %d images: %s: %s", self.reward.card.name, images, kind, reason
        )


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    They are the bytes of one request (`max_bytes`; all requests in memory may take twice as many), the seconds of an
    upload, the seconds of scoring (`timeout`, or a reward's own in `timeouts`), and the number of requests that may
    wait for one reward.
    """

    max_bytes: int = 256_000_000
    upload: float = 60.0
    timeout: float = 300.0
    max_waiting: int = 8
    timeouts: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """Return the time limit of one reward in seconds."""
        return self.timeouts.get(name, self.timeout)


def build_app(
    rewards: Mapping[str, Reward],
    *,
    token: str | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """Return the web application, after every reward has scored the golden image.

    Args:
        rewards: prepared rewards by name.
        token: token that `Authorization: Bearer ...` must carry; None requires no token.
        limits: limits of requests.
    """
    service = Service(rewards, token, limits or Limits())
    app = FastAPI(title="diffalign rewards", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"error": refusal.text}, status_code=refusal.status)

    @app.exception_handler(HTTPException)
    async def explain(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, status_code=error.status_code)

    app.get("/")(service.index)
    app.get("/health")(service.health)
    app.post("/{name}")(service.score)
    return app


class Service:
    """Answers to the requests of clients."""

    def __init__(self, rewards: Mapping[str, Reward], token: str | None, limits: Limits) -> None:
        self.token, self.limits = token, limits
        self.uploads = Uploads(
            max_bytes=limits.max_bytes,
            max_total=2 * limits.max_bytes,
            seconds=min(limits.upload, limits.timeout),
        )
        self.parsing = Parsing()
        self.served = {name: Served(reward) for name, reward in rewards.items()}
        for entry in self.served.values():
            entry.golden = _golden(entry.reward)

    async def index(self, request: Request) -> JSONResponse:
        """Answer with the rewards and how to use them."""
        admit(request.headers, self.token)
        return JSONResponse(
            {
                "service": "diffalign rewards",
                "rewards": list(self.served),
                "GET /health": "cards, limits and a golden image's rewards",
                "POST /NAME": "scores; see docs/rewards.md",
                "in a recipe": {f"remote:{request.base_url}{name}": 1.0 for name in self.served},
            }
        )

    async def health(self, request: Request) -> JSONResponse:
        """Answer with the card, limits and golden image's rewards of each reward."""
        admit(request.headers, self.token)
        rewards = {
            name: {**_describe(entry), "timeout": self.limits.seconds(name)}
            for name, entry in self.served.items()
        }
        return JSONResponse({"timeout": self.limits.timeout, "rewards": rewards})

    async def score(self, name: str, request: Request) -> JSONResponse:
        """Answer with the scores of images."""
        admit(request.headers, self.token)
        if name not in self.served:
            raise Refusal(404, f"no reward {name[:80]!r}; there are {', '.join(self.served)}")
        entry = self.served[name]
        with self.uploads.open() as upload:
            try:
                await self.uploads.receive(upload, request.stream())
            except ClientDisconnect as error:
                raise Refusal(400, "the request ended before its body") from error
            try:
                async with asyncio.timeout(self.limits.seconds(name)):
                    question = await self.parsing.parse(upload.content)
                    if entry.waiting >= self.limits.max_waiting:
                        raise Refusal(503, "too many requests are waiting")
                    return JSONResponse(await _answer(entry, question))
            except TimeoutError as error:
                raise Refusal(504, f"no reward within {self.limits.seconds(name):g} s") from error


def _describe(entry: Served) -> dict[str, Any]:
    """Return the description of a reward for clients."""
    reward = entry.reward
    return {
        "card": dataclasses.asdict(reward.card),
        "required_metadata": list(reward.required_metadata),
        "needs_prompt": reward.needs_prompt,
        "golden": entry.golden,
    }


def _golden(reward: Reward) -> dict[str, Any] | None:
    """Return a reward's output for the golden image, or None if it cannot score it."""
    try:
        value = reward.score(*wire.golden())
        return wire.encode_output(as_output(value, n=1, name=reward.card.name))
    except Exception as error:
        logger.warning(
            "%s cannot score the golden image: %s: %s",
            reward.card.name,
            type(error).__name__,
            one_line(error, limit=LONGEST),
        )
        return None


async def _answer(entry: Served, question: Question) -> dict[str, Any]:
    images, prompts, metadata = question

    def work() -> dict[str, Any]:
        name = entry.reward.card.name
        try:
            output, error = score_all(entry.reward, images, prompts, metadata, name=name)
        except RewardShapeError as error:
            raise Refusal(422, str(error)) from error
        if error is not None:
            entry.report(error, len(prompts))
        return wire.encode_output(output)

    entry.waiting += 1
    try:
        return await asyncio.get_running_loop().run_in_executor(entry.thread, work)
    finally:
        entry.waiting -= 1
