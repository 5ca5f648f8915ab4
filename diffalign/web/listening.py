"""Socket of a server, bound before anything is loaded."""

from __future__ import annotations

import os
import socket

from diffalign.core.errors import UsageError
from diffalign.web.admission import LOOPBACK

PORTS = 65_535


def read_token(variable: str, *, host: str, where: str = "") -> str | None:
    """Return the token in an environment variable, or None without one.

    Args:
        host: address that the server listens on.
        where: where else the variable must be set, for the error's advice.

    Raises:
        UsageError: others can reach the server, and there is no token.
    """
    token = os.environ.get(variable) or None
    if host not in LOOPBACK and token is None:
        raise UsageError(f"host={host}: others can reach the service; set {variable} here{where}")
    return token


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port; 0 is any port that is free.

    Raises:
        UsageError: the port is out of range, or taken.
    """
    if not 0 <= port <= PORTS:
        raise UsageError(f"port={port}: a port is a number from 0 (any that is free) to {PORTS}")
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        raise UsageError(
            f"host={host}, port={port}: cannot listen there ({error.strerror or error}). Choose another port or stop "
            "the program that uses it."
        ) from error


def address_of(listening: socket.socket, host: str) -> str:
    """Return the address of a listening socket as a URL."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
