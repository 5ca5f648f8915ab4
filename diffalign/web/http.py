"""HTTP requests with retries after temporary failures."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from diffalign.web.admission import LOOPBACK

logger = logging.getLogger(__name__)
CONNECT_TIMEOUT = 5.0


def session_for(url: str) -> requests.Session:
    """Return a session, without a proxy for an address of this machine.

    A proxy of the environment would get the images and the token, and could not reach the service.
    """
    session = requests.Session()
    host = urlsplit(url).hostname or ""
    session.trust_env = host not in LOOPBACK and not host.startswith("127.")
    return session


@dataclass
class Patience:
    """Settings of retries.

    The first of `retries` follows after `first_wait` seconds, and each further one after twice the time. Answers with
    one of `statuses` are retried.
    """

    retries: int = 4
    first_wait: float = 0.5
    statuses: tuple[int, ...] = (429, 500, 502, 503)


def ask(
    session: requests.Session,
    method: str,
    url: str,
    *,
    patience: Patience,
    timeout: float,
    message: Any = None,
) -> requests.Response:
    """Send a request, with retries, and return the last answer, whatever its status.

    Raises:
        requests.RequestException: every attempt to connect failed, or no answer came within `timeout` seconds. After a
            timeout there is no retry, because the server may still work on the request.
    """
    for attempt in range(patience.retries + 1):
        last = attempt == patience.retries
        try:
            answer = session.request(method, url, json=message, timeout=(CONNECT_TIMEOUT, timeout))
            if last or answer.status_code not in patience.statuses:
                return answer
            problem = f"{answer.status_code}: {answer.text[:200]}"
        except requests.ConnectionError as error:
            if last:
                raise
            problem = str(error)
        wait = patience.first_wait * 2**attempt
        logger.info("%s: %s; again in %g s", url, problem, wait)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
