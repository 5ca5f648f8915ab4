"""Admission of HTTP requests: the host name that was called, and the token."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Host names of this machine."""


class Refusal(Exception):
    """Answer with another status than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def admit(headers: Mapping[str, str], token: str | None) -> None:
    """Check that a request comes from this machine, or carries the token.

    Without a token only loopback host names are answered, so that a page of another site cannot reach the server by a
    name of its own.

    Args:
        headers: headers of the request, in lower case.
        token: token that `Authorization: Bearer ...` must carry; None requires no token.

    Raises:
        Refusal: 421 another host name, 401 no token or a wrong one.
    """
    if token is None and host_name(headers.get("host", "")) not in LOOPBACK:
        raise Refusal(421, f"without a token this service is called {' or '.join(LOOPBACK)} only")
    header = headers.get("authorization", "")
    # the comparison takes the same time for every wrong token
    if token is not None and not hmac.compare_digest(
        header.encode(errors="replace"), f"Bearer {token}".encode()
    ):
        raise Refusal(401, "a token is needed")


def host_name(header: str) -> str:
    """Return the name in a Host header, without the port."""
    # an IPv6 address
    if header.startswith("["):
        return header.partition("]")[0].removeprefix("[").lower()
    return header.partition(":")[0].lower()
