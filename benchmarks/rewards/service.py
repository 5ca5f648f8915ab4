"""Measure the latency of a reward service while another client misbehaves.

Service (`diffalign serve-rewards --rewards jpeg`) and attacker are processes of their own on loopback. 64 connections
hold unfinished headers, 20 hold unfinished uploads, and bodies of 60 MB arrive one after the other: lists, which are
slow to parse, and base64 that is no image.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
import torch

from benchmarks.common.record import BenchOptions
from diffalign.rewards.wire import encode_request
from diffalign.web.http import Patience, ask, session_for

Attack = Callable[[int, Any], None]
"""Function that attacks a port until an event is set."""
HALF_OPEN, UPLOADS, BODY = 64, 20, 60_000_000
PART = 2_000_000
"""Bytes that arrive of an unfinished upload."""
SECONDS, QUICK_SECONDS = 8.0, 1.0
"""Seconds of one measurement."""
START = Patience(retries=9, first_wait=0.1)
"""Retries until the service has started."""
HOST = "127.0.0.1"


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure valid requests without an attack and beside every attack."""
    seconds = QUICK_SECONDS if options.quick else SECONDS
    attacks: dict[str, Attack] = {
        "none": lambda port, stop: None,
        "half_open_headers": hold(HALF_OPEN, b"POST /jpeg HTTP/1.1\r\nHost: localhost\r\nX: "),
        "unfinished_uploads": hold(UPLOADS, head(BODY) + b"A" * PART),
        "lists_60mb": send(b'{"images":[' + b"[]," * (BODY // 3)),
        "base64_60mb": send(
            b'{"images":["iVBORw0KGgo' + b"A" * (BODY + 1) + b'"],"prompts":["x"]}'
        ),
    }
    attacks["all_together"] = together(list(attacks.values())[1:])
    results: dict[str, Any] = {}
    with service() as (port, pid):
        for name, attack in attacks.items():
            results[name] = {**measure(port, attack, seconds), "resident_mb": resident(pid)}
    return {
        "headline": {name: cell["p99_s"] for name, cell in results.items()},
        "seconds": seconds,
        "body_bytes": BODY,
        "half_open_connections": HALF_OPEN,
        "attacks": results,
    }


@contextlib.contextmanager
def service() -> Iterator[tuple[int, int]]:
    """Start a service and yield its port and process id."""
    command = [sys.executable, "-m", "diffalign.cli", "serve-rewards", "--rewards=jpeg", "--port=0"]
    environment = {k: v for k, v in os.environ.items() if k != "DIFFALIGN_REWARD_TOKEN"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline().split(":")[3].partition("/")[0])
        url = f"http://{HOST}:{port}/health"
        ask(session_for(url), "GET", url, patience=START, timeout=5)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


def measure(port: int, attack: Attack, seconds: float) -> dict[str, float]:
    """Return latencies of valid requests, sent one after the other during an attack."""
    # The attacker is a process of its own, because sending would delay the measuring thread.
    forked = multiprocessing.get_context("fork")
    stop = forked.Event()
    attacker = forked.Process(target=attack, args=(port, stop), daemon=True)
    attacker.start()
    images = torch.tensor([200, 30, 30], dtype=torch.uint8).view(3, 1, 1).expand(4, 3, 64, 64)
    message = encode_request(images, ["x"] * 4, [{}] * 4)
    latencies, failures = [], 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        try:
            answer = requests.post(f"http://{HOST}:{port}/jpeg", json=message, timeout=30)
            failures += answer.status_code != requests.codes.ok
        except requests.RequestException:
            failures += 1
        latencies.append(time.perf_counter() - began)
        time.sleep(0.01)
    stop.set()
    attacker.join(10)
    attacker.kill()
    latencies.sort()
    return {
        "requests": len(latencies),
        "failures": failures,
        "p50_s": round(statistics.median(latencies), 4),
        "p99_s": round(latencies[int(0.99 * (len(latencies) - 1))], 4),
        "max_s": round(latencies[-1], 4),
    }


def head(length: int) -> bytes:
    """Return the headers of a request with a body of `length` bytes."""
    return f"POST /jpeg HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def hold(count: int, content: bytes) -> Attack:
    """Return an attack that holds `count` open connections with this content.

    A connection that the service closes is opened again.
    """

    def attack(port: int, stop: Any) -> None:
        connections: list[socket.socket] = []
        while not stop.is_set():
            while len(connections) < count and not stop.is_set():
                connections.append(connect(port, content))
            connections = [c for c in connections if is_open(c)]
            stop.wait(0.2)
        for connection in connections:
            connection.close()

    return attack


def connect(port: int, content: bytes) -> socket.socket:
    """Open a connection and send as much of the content as the service takes."""
    connection = socket.create_connection((HOST, port), timeout=5)
    with contextlib.suppress(OSError):
        connection.sendall(content)
    connection.setblocking(False)
    return connection


def is_open(connection: socket.socket) -> bool:
    """Return whether a connection is still open and unanswered; close it otherwise."""
    try:
        connection.recv(1000)
    except BlockingIOError:
        return True
    except OSError:
        # the service has reset the connection, which is closed here as one that it has answered is
        pass
    connection.close()
    return False


def send(body: bytes) -> Attack:
    """Return an attack that sends `body` repeatedly."""

    def attack(port: int, stop: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(requests.RequestException):
                requests.post(f"http://{HOST}:{port}/jpeg", data=body, timeout=60)

    return attack


def together(
    attacks: list[Attack],
) -> Attack:
    """Return an attack that runs several attacks at the same time."""

    def attack(port: int, stop: Any) -> None:
        threads = [threading.Thread(target=a, args=(port, stop), daemon=True) for a in attacks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return attack


def resident(pid: int) -> int | None:
    """Return the resident memory of a process in MB, or None without /proc."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return int(text.partition("VmRSS:")[2].split()[0]) // 1000
