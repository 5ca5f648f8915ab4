"""Servers as processes of their own, and clients that load them."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests

from diffalign.serving.start import TOKEN
from diffalign.web.http import Patience, ask, session_for

PATH = "/v1/images/generations"
START = Patience(retries=12, first_wait=0.1)
"""Retries until a server is ready."""
Body = dict[str, Any]


@dataclass
class Outcome:
    """Answers to a load.

    Attributes:
        seconds: latencies of the answered requests.
        waited: steps of others that began before the first step of each image.
        refused: number of requests with status 429.
        lost: number of requests without an answer, or with another status.
        length: seconds from the first request to the last answer.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)
    refused: int = 0
    lost: int = 0
    length: float = 0.0

    def figures(self) -> dict[str, float]:
        """Return images per second, quantiles of the latency, and counts."""
        quantiles = np.quantile(self.seconds, (0.5, 0.95, 0.99)) if self.seconds else [np.nan] * 3
        names = ("p50_s", "p95_s", "p99_s")
        return {
            "images_per_s": len(self.seconds) / self.length,
            **{n: round(float(q), 4) for n, q in zip(names, quantiles, strict=True)},
            "answered": len(self.seconds),
            "refused": self.refused,
            "lost": self.lost,
        }


@contextlib.contextmanager
def server(command: Sequence[str]) -> Iterator[str]:
    """Start a Python module that serves, and yield its address when it is ready."""
    environment = {k: v for k, v in os.environ.items() if k != TOKEN}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *command], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        url = next(line.split()[-1] for line in lines if line.startswith("listening on"))
        # whatever else it prints must not fill the pipe
        threading.Thread(target=process.stdout.read, daemon=True).start()
        ask(session_for(url), "GET", url + "/ready", patience=START, timeout=5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def send(url: str, body: Body, outcome: Outcome, lock: threading.Lock) -> None:
    """Send one request, and add its answer to the outcome."""
    begin = time.monotonic()
    try:
        with session_for(url) as session:
            answer = session.post(url + PATH, json=body, timeout=300)
    except requests.RequestException:
        with lock:
            outcome.lost += 1
        return
    with lock:
        if answer.status_code == 200:
            outcome.seconds.append(time.monotonic() - begin)
            outcome.waited.append(answer.json()["data"][0].get("waited_steps", 0))
        elif answer.status_code == 429:
            outcome.refused += 1
        else:
            outcome.lost += 1


def closed_loop(url: str, make: Callable[[int], Body], *, clients: int, requests_: int) -> Outcome:
    """Return the outcome of clients that each send the next request after the last answer."""
    outcome, lock, begin = Outcome(), threading.Lock(), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda i: send(url, make(i), outcome, lock), range(requests_)))
    outcome.length = time.monotonic() - begin
    return outcome


def open_loop(url: str, make: Callable[[int], Body], *, rate: float, seconds: float) -> Outcome:
    """Return the outcome of requests that arrive at random times, whatever became of those before."""
    dice, outcome, lock = random.Random(0), Outcome(), threading.Lock()
    threads: list[threading.Thread] = []
    begin = following = time.monotonic()
    while following < begin + seconds:
        time.sleep(max(0.0, following - time.monotonic()))
        thread = threading.Thread(target=send, args=(url, make(len(threads)), outcome, lock))
        thread.start()
        threads.append(thread)
        following += dice.expovariate(rate)
    for thread in threads:
        thread.join()
    outcome.length = time.monotonic() - begin
    return outcome


class Pulse:
    """Poller of `/health` while other requests are served.

    Attributes:
        seconds: latencies.
    """

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        session = session_for(self._url)
        while not self._stop.wait(0.05):
            begin = time.monotonic()
            session.get(self._url + "/health", timeout=30)
            self.seconds.append(time.monotonic() - begin)

    @property
    def p99(self) -> float:
        """Latency in seconds that 99 % of the polls keep."""
        return float(np.quantile(self.seconds, 0.99)) if self.seconds else float("nan")


def metric(url: str, name: str) -> float:
    """Return a metric of a server."""
    with session_for(url) as session:
        lines = session.get(url + "/metrics", timeout=30).text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))
