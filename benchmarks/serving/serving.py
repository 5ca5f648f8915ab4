"""Measure `diffalign serve`: load, right images among aborted requests, and random requests.

All servers run on this machine in turns, with float32 weights: the engine, the engine with `--deterministic`, and a
plain FastAPI server that draws one request after the other. Capacity is the images per second of the engine with eight
clients. Each image of the mixed requests is compared with the plain pipeline's.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from benchmarks.common.record import BenchOptions
from benchmarks.serving.clients import (
    PATH,
    Body,
    Pulse,
    closed_loop,
    metric,
    open_loop,
    server,
)
from diffalign.pipelines.registry import load_model
from diffalign.shapes.prompts import prompts
from diffalign.web.http import session_for

MODEL, STEPS, SIZE, CLIENTS = "shapes-sd3", 28, "64x64", 8
LOADS = (1, 2, 5)
"""Rates of the open loop, as multiples of the capacity."""
SIZES = ("64x64", "32x64", "48x48")
ABORTED = 0.05
"""Share of the mixed requests whose client leaves before the answer."""
LEAST = 50.0
"""PSNR in dB below which an image of a shared forward counts as wrong."""
SAME = 200.0
"""PSNR in dB that stands for equal images."""
OWN = ("diffalign.cli", "serve", f"--model={MODEL}", "--port=0", "--dtype=float32", "--queue=64")
MEMORY = "diffalign_memory_bytes"
Figures = dict[str, Any]


def run(options: BenchOptions) -> Figures:
    """Measure every server; `options.arms` chooses among load, mixed and fuzz."""
    torch.set_num_threads(1)
    parts: dict[str, Callable[[bool], Figures]] = {"load": load, "mixed": mixed, "fuzz": fuzz}
    results = {
        name: options.cached(
            name, 0, partial(parts[name], options.quick), key=[STEPS, LOADS, SIZES]
        )
        for name in options.select(parts)
    }
    return {"headline": _headline(results), "steps": STEPS, "clients": CLIENTS, **results}


def _headline(results: Figures) -> Figures:
    headline: Figures = {}
    if "load" in results:
        part = results["load"]
        loads = part["open_loop"].values()
        headline |= {
            "throughput_ratio": part["throughput_ratio"],
            "p95_wait_steps": part["p95_wait_steps"],
            "refused": sum(cell["refused"] for cell in loads),
            "lost": sum(cell["lost"] for cell in loads),
        }
    if "mixed" in results:
        cells = results["mixed"].values()
        headline |= {
            "wrong_images": sum(cell["wrong"] for cell in cells),
            "memory_ratio": max(cell["memory_ratio"] for cell in cells),
            "health_p99_s": max(cell["health_p99_s"] for cell in cells),
        }
    if "fuzz" in results:
        headline["server_errors"] = results["fuzz"]["server_errors"]
    return headline


def load(quick: bool) -> Figures:
    """Return throughput at eight clients beside the plain server, and the open loop's figures."""
    count, seconds = (16, 5.0) if quick else (400, 120.0)
    with server(("benchmarks.serving.plain", MODEL)) as url:
        closed_loop(url, ordinary, clients=1, requests_=2)
        plain = closed_loop(url, ordinary, clients=CLIENTS, requests_=count)
    with server(OWN) as url:
        closed_loop(url, ordinary, clients=1, requests_=2)
        alone = closed_loop(url, ordinary, clients=1, requests_=max(4, count // 8))
        engine = closed_loop(url, ordinary, clients=CLIENTS, requests_=count)
        capacity = engine.figures()["images_per_s"]
        loads = {}
        for times in LOADS:
            before = metric(url, MEMORY)
            outcome = open_loop(url, ordinary, rate=times * capacity, seconds=seconds)
            loads[str(times)] = {
                **outcome.figures(),
                "memory_ratio": metric(url, MEMORY) / before,
            }
    # a request waits for the step in progress, too
    waited = float(np.quantile(engine.waited, 0.95)) + 1
    return {
        "throughput_ratio": round(capacity / plain.figures()["images_per_s"], 3),
        "p95_wait_steps": waited,
        "plain": plain.figures(),
        "engine_one_client": alone.figures(),
        "engine": engine.figures(),
        "seconds": seconds,
        "open_loop": loads,
    }


def ordinary(number: int) -> Body:
    """Return a request of the load."""
    texts = _texts()
    return {
        "prompt": texts[number % len(texts)],
        "seed": number,
        "size": SIZE,
        "num_inference_steps": STEPS,
    }


def mixed(quick: bool) -> Figures:
    """Return the wrong images among mixed requests, of both modes of the engine."""
    count, kinds = (40, 6) if quick else (1000, 60)
    bodies = [_mixed_body(random.Random(i), i) for i in range(kinds)]
    expected = _plain_images(bodies)
    return {
        "shared": _mixed(OWN, bodies, expected, count, least=LEAST),
        "deterministic": _mixed((*OWN, "--deterministic"), bodies, expected, count, least=SAME),
    }


def _mixed(
    command: tuple[str, ...],
    bodies: list[Body],
    expected: list[np.ndarray],
    count: int,
    *,
    least: float,
) -> Figures:
    dice = random.Random(1)
    order = [dice.randrange(len(bodies)) for _ in range(count)]
    leaves = [dice.random() < ABORTED for _ in range(count)]
    values: list[float] = []
    lost, lock = 0, threading.Lock()
    with server(command) as url, Pulse(url) as pulse:

        def one(number: int) -> None:
            nonlocal lost
            body = bodies[order[number]]
            if leaves[number]:
                return abort(url, body, after=0.01 + 0.2 * random.Random(number).random())
            with session_for(url) as session:
                answer = session.post(url + PATH, json=body, timeout=300)
            with lock:
                if answer.status_code != 200:
                    lost += 1
                    return None
                image = decoded(answer.json()["data"][0]["b64_json"])
                values.append(psnr(image, expected[order[number]]))
            return None

        # the first tenth fills caches and pools
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(one, range(count // 10)))
            before = metric(url, MEMORY)
            list(pool.map(one, range(count // 10, count)))
        memory = metric(url, MEMORY) / before
        health = pulse.p99
    return {
        "images": len(values),
        "aborted": sum(leaves),
        "lost": lost,
        "wrong": sum(value < least for value in values),
        "least_psnr": round(min(values), 2),
        "memory_ratio": round(memory, 4),
        "health_p99_s": round(health, 4),
    }


def fuzz(quick: bool) -> Figures:
    """Return the statuses of random requests."""
    count = 200 if quick else 10_000
    statuses: dict[str, int] = {}
    dice = random.Random(0)
    with server((*OWN, "--max_steps=2")) as url:
        session = session_for(url)
        for _ in range(count):
            headers = {"content-type": "application/json"}
            answer = session.post(url + PATH, data=fuzzed(dice), headers=headers, timeout=60)
            key = str(answer.status_code)
            statuses[key] = statuses.get(key, 0) + 1
        alive = session.get(url + "/health", timeout=30).status_code == 200
    errors = sum(n for status, n in statuses.items() if status.startswith("5"))
    return {"requests": count, "statuses": statuses, "server_errors": errors, "alive": alive}


def fuzzed(dice: random.Random) -> bytes:
    """Return the bytes of a request with random fields and values, or of no JSON."""
    values: list[Any] = [None, True, -1, 0, 1, 2.5, 1e308, 2**70, "", "x", SIZE, "-1x-1", [], {}]
    values += [[[1]], {"a": [{}]}, "\0", "\ud800", "é" * 50, "../x", "auto", "x" * 40_000]
    names = ["prompt", "n", "size", "seed", "quality", "lora", "model", "stream", "preset", "x"]
    names += ["num_inference_steps", "guidance_scale", "negative_prompt", "partial_images"]
    body: Body = {**ordinary(0), "num_inference_steps": 1} if dice.random() < 0.5 else {}
    for name in dice.sample(names, dice.randrange(1, 5)):
        body[name] = dice.choice(values)
    content = json.dumps(body).encode()
    if dice.random() < 0.2:
        content = content[: dice.randrange(len(content))] + dice.randbytes(3)
    return content


def abort(url: str, body: Body, *, after: float) -> None:
    """Send a request, and leave before the answer."""
    line = urlsplit(url)
    connection = http.client.HTTPConnection(str(line.hostname), line.port, timeout=60)
    content = json.dumps(body).encode()
    connection.request("POST", PATH, content, {"content-type": "application/json"})
    threading.Event().wait(after)
    connection.close()


def decoded(text: str) -> np.ndarray:
    """Return the pixels (H, W, 3) of an image in base64."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as file:
        return np.array(file)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the PSNR of two images in dB; `SAME` for equal ones."""
    error = float(((one.astype(float) - other.astype(float)) ** 2).mean())
    return SAME if error == 0 else 10 * math.log10(255**2 / error)


def _mixed_body(dice: random.Random, number: int) -> Body:
    return {
        "prompt": dice.choice(_texts()),
        "seed": number,
        "size": dice.choice(SIZES),
        "num_inference_steps": dice.randrange(4, 13),
        "guidance_scale": dice.choice((1.0, 2.0, 4.5)),
    }


def _plain_images(bodies: list[Body]) -> list[np.ndarray]:
    """Return the images that the plain pipeline draws, one at a time."""
    # the module needs the extra `server`, without which benchmarks can be listed
    from benchmarks.serving.plain import draw

    model = load_model(MODEL, dtype=torch.float32)
    return [draw(model, body).permute(1, 2, 0).numpy() for body in bodies]


@cache
def _texts() -> list[str]:
    return [entry["prompt"] for entry in prompts("held_out")]
