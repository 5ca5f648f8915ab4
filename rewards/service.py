"""A reward service: rewards behind HTTP, for those that need a GPU or an environment of their own.

    diffalign serve-rewards --rewards pickscore,ocr --port 8100

and in a recipe `rewards: {"remote:http://127.0.0.1:8100/pickscore": 1.0}`. GET /health names the rewards, POST /NAME
scores (`wire.encode_request`). It listens on loopback unless told otherwise, can ask for a token, bounds the size of
requests, and answers whatever it gets.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from diffalign.rewards import wire
from diffalign.rewards.base import Reward, one_by_one

logger = logging.getLogger(__name__)


@dataclass
class Served:
    """A reward and the one thread that may use it: models are not made for two at a time."""

    reward: Reward
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    waiting: int = 0
    golden: dict[str, Any] | None = None


@dataclass(frozen=True)
class Limits:
    """Of a request: bytes, seconds of scoring (`timeout`, but for the rewards that `timeouts` names), and how many may
    wait for one reward."""

    max_bytes: int = 256_000_000
    timeout: float = 300.0
    max_waiting: int = 8
    timeouts: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """For one reward."""
        return self.timeouts.get(name, self.timeout)


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def build_app(
    rewards: Mapping[str, Reward], *, token: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """The service. Every reward has scored the golden image when this returns.

    Args:
        rewards: by name, ready to score.
        token: what `Authorization: Bearer ...` must carry; None asks for nothing.
        limits: of a request.
    """
    bounds = limits or Limits()
    served = {name: Served(reward) for name, reward in rewards.items()}
    for entry in served.values():
        entry.golden = _golden(entry.reward)
    app = FastAPI(title="diffalign rewards", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"error": refusal.text}, status_code=refusal.status)

    def admit(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(
            given.encode(errors="replace"), f"Bearer {token}".encode()
        ):
            raise Refusal(401, "a token is needed")

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        admit(request)
        return JSONResponse(
            {
                "timeout": bounds.timeout,
                "rewards": {
                    name: {**_describe(s), "timeout": bounds.seconds(name)}
                    for name, s in served.items()
                },
            }
        )

    @app.post("/{name}")
    async def score(name: str, request: Request) -> JSONResponse:
        admit(request)
        if name not in served:
            raise Refusal(404, f"no reward {name[:80]!r}; there are {', '.join(served)}")
        entry = served[name]
        try:
            content = await asyncio.wait_for(_content(request, bounds), bounds.timeout)
        except TimeoutError as error:  # the way is the same for all rewards
            raise Refusal(408, f"the request did not arrive within {bounds.timeout:g} s") from error
        if entry.waiting >= bounds.max_waiting:
            raise Refusal(503, "too many requests are waiting")
        entry.waiting += 1
        try:
            return JSONResponse(await _answer(entry, content, bounds.seconds(name)))
        finally:
            entry.waiting -= 1

    return app


def _describe(entry: Served) -> dict[str, Any]:
    """What a client has to know of a reward."""
    reward = entry.reward
    return {
        "card": dataclasses.asdict(reward.card),
        "required_metadata": list(reward.required_metadata),
        "needs_prompt": reward.needs_prompt,
        "golden": entry.golden,
    }


def _golden(reward: Reward) -> dict[str, Any] | None:
    """The golden image's reward; None where a reward cannot score it."""
    try:
        return wire.encode_output(reward.score(*wire.golden()))
    except Exception:
        logger.exception("%s cannot score the golden image", reward.card.name)
        return None


async def _content(request: Request, bounds: Limits) -> bytes:
    content = bytearray()
    async for part in request.stream():  # a length in the header may lie
        content += part
        if len(content) > bounds.max_bytes:
            raise Refusal(413, f"a request may have {bounds.max_bytes} bytes")
    return bytes(content)


async def _answer(entry: Served, content: bytes, timeout: float) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        try:
            message = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "the request is not JSON") from error
        try:
            images, prompts, metadata = wire.decode_request(message)
        except wire.WireError as error:
            raise Refusal(422, str(error)) from error
        try:
            return wire.encode_output(entry.reward.score(images, prompts, metadata))
        except Exception:
            logger.exception("%s failed on %d images", entry.reward.card.name, len(prompts))
            return wire.encode_output(one_by_one(entry.reward, images, prompts, metadata))

    future = asyncio.get_running_loop().run_in_executor(entry.thread, work)
    try:
        return await asyncio.wait_for(future, timeout)
    except TimeoutError as error:
        raise Refusal(504, f"no reward within {timeout:g} s") from error
