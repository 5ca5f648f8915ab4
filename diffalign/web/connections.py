"""HTTP connections of a server, bounded in number and idle time."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""Seconds for a request's line and headers, since the connection or the previous answer."""
MAX_CONNECTIONS = 256
"""Largest number of open connections; beyond it a new one closes the oldest idle one."""
MAX_HEADER = 16_384
"""Largest size in bytes of a request's line and headers."""


class BoundedConnection(H11Protocol):
    """Connection of uvicorn that is closed if no request arrives in time."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            others: list[Any] = [c for c in self.connections if c is not self]
            idle = [connection for connection in others if not connection.is_busy()]
            # the connection that has waited longest is due first
            victim = min(idle, key=lambda c: c.due(), default=self)
            victim.transport.abort()
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_busy():
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def is_busy(self) -> bool:
        """Return True while a request is answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def due(self) -> float:
        """Return the event loop's time at which the idle connection is closed."""
        return self._waiting.when() if self._waiting is not None else self.loop.time()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self.is_busy():
            self.transport.abort()


def make_server(app: Any, **kwargs: Any) -> uvicorn.Server:
    """Return a server of an ASGI application with bounded connections.

    Args:
        kwargs: arguments of `uvicorn.Config`.
    """
    config = uvicorn.Config(
        app,
        log_level="error",
        http=BoundedConnection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER,
        **kwargs,
    )
    return uvicorn.Server(config)
