"""Metrics of a server in Prometheus' format. No label holds a prompt, a path or a client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from diffalign.serving.engine import Engine
from diffalign.serving.observer import Observer
from diffalign.serving.tickets import Finished, ImageSettings

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
"""Upper bounds of the buckets of times."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Upper bounds of the buckets of images in a forward."""
OTHER_SIZE = "other"
"""Label of sizes that were not declared, whose number clients decide."""


class Metrics(Observer):
    """Metrics of one server, in a registry of its own."""

    def __init__(self, sizes: Iterable[tuple[int, int]] = ()) -> None:
        """Declare the sizes (height, width) that get labels of their own."""
        self.registry = CollectorRegistry()
        self._sizes = set(sizes)
        make: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "diffalign_requests", "Requests by status of the answer", ["status"], **make
        )
        self._images = Counter("diffalign_images", "Finished images", **make)
        self._latency = Histogram(
            "diffalign_latency_seconds",
            "Time from the request of an image to the image",
            ["size", "preset"],
            buckets=SECONDS,
            **make,
        )
        self._queue = Histogram(
            "diffalign_queue_seconds", "Time before an image's first step", buckets=SECONDS, **make
        )
        self._rows = Histogram(
            "diffalign_batch_rows", "Images in a forward of the denoiser", buckets=ROWS, **make
        )
        self._steps = Counter("diffalign_steps", "Steps of images", ["kind"], **make)
        self._cancelled = Counter("diffalign_cancelled", "Images not drawn", ["why"], **make)
        self._oom = Counter("diffalign_oom", "Forwards that ran out of memory", **make)

    def watch(self, engine: Engine) -> None:
        """Add what is read off the engine when the metrics are asked for."""
        self.registry.register(_Gauges(engine))
        Gauge(
            "diffalign_max_batch", "Largest number of images in progress", registry=self.registry
        ).set(engine.settings.max_batch)

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self.registry)

    def forward(self, rows: int) -> None:
        self._rows.observe(rows)

    def steps(self, computed: int, skipped: int) -> None:
        self._steps.labels("computed").inc(computed)
        self._steps.labels("skipped").inc(skipped)

    def finished(self, settings: ImageSettings, image: Finished) -> None:
        height, width = settings.size
        size = f"{width}x{height}" if settings.size in self._sizes else OTHER_SIZE
        self._images.inc()
        self._latency.labels(size, settings.mode).observe(image.seconds)
        self._queue.observe(image.queue_seconds)

    def cancelled(self, cause: str) -> None:
        self._cancelled.labels(cause).inc()

    def out_of_memory(self) -> None:
        self._oom.inc()


class _Gauges:
    """Collector of what an engine holds now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """Yield the gauges."""
        values = {
            "diffalign_queue_depth": ("Images that wait", self._engine.queued),
            "diffalign_running": ("Images in progress", self._engine.running),
            "diffalign_rows_limit": (
                "Largest number of images in a forward",
                self._engine.batches.limit,
            ),
            "diffalign_memory_bytes": ("Memory of the process", psutil.Process().memory_info().rss),
            "diffalign_gpu_peak_bytes": ("Peak memory of the GPU", gpu_peak()),
        }
        for name, (text, value) in values.items():
            yield GaugeMetricFamily(name, text, value=float(value))


def gpu_peak() -> int:
    """Return the peak of allocated GPU memory in bytes; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
