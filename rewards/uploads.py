"""Uploads of requests to the reward service, limited in bytes, time and JSON structure."""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffalign.rewards import wire
from diffalign.web.admission import Refusal

BASE64 = (string.ascii_letters + string.digits + "+/=").encode()
LARGE = 4_000_000
"""Size in bytes from which a request is parsed separately from small ones."""
Question = tuple[Tensor, list[str], list[dict[str, Any]]]
"""Images (B, 3, H, W) uint8, B prompts, B metadata."""
MAX_OTHER = 1_000_000
"""Largest number of bytes in a request besides letters, digits and base64's signs.

Images are base64 and all else is short, so this bounds brackets, commas, escapes and blanks, on which the time and
memory of parsing depend.
"""


@dataclass
class Upload:
    """Received bytes of one request."""

    content: bytearray = field(default_factory=bytearray)
    other: int = 0
    complete: bool = False
    dropped: bool = False


class Uploads:
    """Requests in memory, together at most `max_total` bytes.

    If a new part would exceed that limit, the largest unfinished request is dropped.
    """

    def __init__(self, *, max_bytes: int, max_total: int, seconds: float) -> None:
        """Limit each request to `max_bytes` and `seconds` of upload."""
        self.max_bytes, self.max_total, self.seconds = max_bytes, max_total, seconds
        self._held: list[Upload] = []

    @property
    def total(self) -> int:
        """Number of bytes in memory."""
        return sum(len(u.content) for u in self._held)

    @contextmanager
    def open(self) -> Iterator[Upload]:
        """Keep a request in memory until the block ends."""
        upload = Upload()
        self._held.append(upload)
        try:
            yield upload
        finally:
            self._held.remove(upload)

    async def receive(self, upload: Upload, stream: AsyncIterator[bytes]) -> None:
        """Read a request to its end.

        Raises:
            Refusal: 413 too large, 408 too slow, 503 dropped for other requests.
        """
        try:
            async with asyncio.timeout(self.seconds):
                # bytes are counted, because a length in the header may be wrong
                async for part in stream:
                    self._take(upload, part)
        except TimeoutError as error:
            raise Refusal(408, f"the request did not arrive within {self.seconds:g} s") from error
        if upload.dropped:
            raise Refusal(503, "too many bytes are on their way; this request was the largest")
        upload.complete = True

    def _take(self, upload: Upload, part: bytes) -> None:
        if len(upload.content) + len(part) > self.max_bytes:
            raise Refusal(413, f"a request may have {self.max_bytes} bytes")
        upload.other += len(part.translate(None, BASE64))
        if upload.other > MAX_OTHER:
            raise Refusal(413, f"a request may have {MAX_OTHER} bytes besides its base64")
        if self.total + len(part) > self.max_total:
            self._make_room()
        if upload.dropped:
            raise Refusal(503, "too many bytes are on their way; this request was the largest")
        upload.content += part

    def _make_room(self) -> None:
        unfinished = [u for u in self._held if not u.complete and not u.dropped]
        largest = max(unfinished, key=lambda u: len(u.content))
        largest.dropped = True
        largest.content = bytearray()


class Parsing:
    """Threads that parse requests, separate for large and small ones, and not those of rewards."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(2)
        self._large = ThreadPoolExecutor(1)

    async def parse(self, content: bytearray) -> Question:
        """Return images, prompts and metadata.

        Raises:
            Refusal: 400 no JSON, 422 not the format of `wire.encode_request`.
        """
        pool = self._large if len(content) > LARGE else self._small
        return await asyncio.get_running_loop().run_in_executor(pool, _parse, content)


def _parse(content: bytearray) -> Question:
    try:
        message = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the request is not JSON") from error
    try:
        return wire.decode_request(message)
    except wire.WireError as error:
        raise Refusal(422, str(error)) from error
