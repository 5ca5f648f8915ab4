"""Engine that draws the images of many clients together, each as it would be alone.

Images at different steps share a forward of the denoiser, because every family takes a timestep for each row. An image
joins at the next step and leaves when it is done. Its noise, its scheduler's steps and its cache are its own, and its
decoding is done alone. Only the rounding of the shared forward depends on its company.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from diffalign.core.errors import UsageError, one_line, out_of_memory
from diffalign.core.precision import compute
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.sampling import EmbedCache
from diffalign.serving.batches import Batches
from diffalign.serving.loras import Loras
from diffalign.serving.modes import Mode
from diffalign.serving.observer import Observer
from diffalign.serving.row import Key, Row, drawing_of
from diffalign.serving.tickets import Failed, Finished, ImageSettings, Partial, Ticket
from diffalign.types import Size

logger = logging.getLogger(__name__)
RECENT = 32
"""Number of finished images whose seconds the estimate of a wait is made of."""
DRAIN_SECONDS = 60.0
"""Seconds in which images in progress are finished at the end."""


class QueueFull(Exception):
    """More images wait than the engine keeps; `seconds` is an estimate of the wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; ask again in {seconds:.0f} s")
        self.seconds = seconds


class Closing(Exception):
    """The engine takes no images any more."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine.

    Attributes:
        max_batch: largest number of images in progress.
        max_wait: seconds that an idle engine waits for company before the first step.
        queue: largest number of images that wait.
        deterministic: compute every image's forwards alone, so that it is the same to the bit in any company.
        buckets: numbers of images in a forward, as in `Batches`.
        mixed_precision: "bf16" (autocast) or "no".
    """

    max_batch: int = 8
    max_wait: float = 0.0
    queue: int = 64
    deterministic: bool = False
    buckets: tuple[int, ...] = ()
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is too small. Set at least 1.")


@dataclass
class _State:
    """Images in progress and waiting, guarded by the engine's condition."""

    waiting: deque[Ticket] = field(default_factory=deque)
    rows: list[Row] = field(default_factory=list)
    round: int = 0
    closing: bool = False
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))


class Engine:
    """Engine of one model.

    `submit` may be called from any thread. One thread draws (`start`), or the caller does (`round`).

    Attributes:
        modes: modes by name; the first is the default.
    """

    def __init__(
        self,
        model: TextToImageModel,
        settings: EngineSettings | None = None,
        *,
        modes: Sequence[Mode] = (Mode(),),
        loras: Loras | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.model, self.settings = model, settings or EngineSettings()
        self.modes = {mode.name: mode for mode in modes}
        self.loras = loras or Loras(model)
        self.observer = observer or Observer()
        limit = 1 if self.settings.deterministic else self.settings.max_batch
        self.batches = Batches(
            model, limit=limit, buckets=self.settings.buckets, observer=self.observer
        )
        self._embed = EmbedCache(model, size=256)
        self._state = _State()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def queued(self) -> int:
        """Number of images that wait."""
        return len(self._state.waiting)

    @property
    def running(self) -> int:
        """Number of images in progress."""
        return len(self._state.rows)

    @property
    def is_alive(self) -> bool:
        """True while the engine's thread draws or waits."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Add the images of one request to the queue: all of them, or none.

        Raises:
            QueueFull: there is no place for all of them.
            Closing: the engine is at its end.
        """
        with self._changed:
            state = self._state
            if state.closing:
                raise Closing("the server is shutting down")
            free = self.settings.max_batch - len(state.rows)
            if len(state.waiting) + len(tickets) > self.settings.queue + max(0, free):
                raise QueueFull(self.expected_wait())
            for ticket in tickets:
                ticket.round = state.round
            state.waiting.extend(tickets)
            self._changed.notify_all()

    def expected_wait(self) -> float:
        """Return an estimate of the seconds until a place in the queue is free."""
        recent = sorted(self._state.recent)
        middle = recent[len(recent) // 2] if recent else 1.0
        return max(1.0, middle)

    def start(self) -> None:
        """Draw in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, *, seconds: float = DRAIN_SECONDS) -> None:
        """Take no more images, finish all that were taken, and end the thread.

        Images that are not finished in time fail.
        """
        with self._changed:
            self._state.closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
        with self._changed:
            tickets = [*self._state.waiting, *(row.ticket for row in self._state.rows)]
            self._state.waiting.clear()
        for ticket in tickets:
            ticket.cancel("shutdown")
            self._fail(ticket, "shutdown", "the server was shut down before the image was done")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._state.waiting or self._state.rows or self._state.closing):
                    self._changed.wait()
                if self._state.closing and not (self._state.waiting or self._state.rows):
                    return
                if not self._state.rows and self.settings.max_wait > 0:
                    self._await_company()
            try:
                self.round()
            except Exception as error:
                # whatever it is, the other clients must not be left without an answer
                logger.exception("a round failed")
                for row in self._state.rows:
                    self._fail(row.ticket, "error", one_line(error, limit=200))
                self._state.rows.clear()

    def _await_company(self) -> None:
        """Wait a moment for more images; the condition is held."""
        end = time.monotonic() + self.settings.max_wait
        while len(self._state.waiting) < self.settings.max_batch and not self._state.closing:
            if (left := end - time.monotonic()) <= 0:
                return
            self._changed.wait(left)

    @torch.no_grad()
    def round(self) -> None:
        """Take one step of every image in progress, after those that wait have joined."""
        state = self._state
        state.rows = [row for row in state.rows if self._is_open(row.ticket)]
        self._admit()
        state.round += 1
        groups: dict[Key, list[Row]] = {}
        with compute(self.model.device, self.settings.mixed_precision):
            for row in state.rows:
                if row.begin():
                    groups.setdefault(row.key, []).append(row)
            failed = [pair for rows in groups.values() for pair in self._advance(rows)]
            for row, error in failed:
                state.rows.remove(row)
                self._report_error(row.ticket, error)
            lost = len(failed)
            computed = sum(map(len, groups.values())) - lost
            self.observer.steps(computed, len(state.rows) - computed)
            for row in list(state.rows):
                self._show(row)

    def _advance(self, rows: list[Row]) -> list[tuple[Row, Exception]]:
        self.loras.use(rows[0].ticket.settings.lora)
        return self.batches.run(rows)

    def _admit(self) -> None:
        """Let waiting images join while there is room."""
        state = self._state
        while len(state.rows) < self.settings.max_batch:
            with self._changed:
                if not state.waiting:
                    return
                ticket = state.waiting.popleft()
            if not self._is_open(ticket):
                continue
            try:
                state.rows.append(self._row(ticket))
            except Exception as error:
                self._report_error(ticket, error)

    def _row(self, ticket: Ticket) -> Row:
        """Return the state of an image before its first step."""
        settings = ticket.settings
        guided = self.model.costs_a_forward(settings.guidance_scale)
        drawing = drawing_of(ticket, self.settings.mixed_precision)
        # the text encoders run in their own precision
        embeds = self._embed([settings.prompt])
        negative = self._embed([settings.negative_prompt]) if guided else None
        with compute(self.model.device, self.settings.mixed_precision):
            return Row(
                self.model,
                ticket,
                self.modes[settings.mode],
                drawing,
                embeds=embeds,
                negative=negative,
                round_number=self._state.round,
            )

    def _show(self, row: Row) -> None:
        """Report a partial or the finished image of a row; its decoding is done alone."""
        if not row.is_done and row.clean is None:
            return
        try:
            latents = row.latents if row.is_done else row.clean
            assert latents is not None
            images, finite = self.model.decode_checked(latents.to(row.latents.dtype))
            if not row.is_done:
                index = sum(1 for s in row.previews if s < row.step) - 1
                row.ticket.listener(Partial(index, images[0].cpu()))
                return
            self._state.rows.remove(row)
            if not bool(finite.all()):
                self._fail(row.ticket, "not_finite", "the image has values that are not finite")
                return
            self._finish(row, images[0].cpu())
        except Exception as error:
            if row in self._state.rows:
                self._state.rows.remove(row)
            self._report_error(row.ticket, error)

    def _finish(self, row: Row, image: torch.Tensor) -> None:
        ticket, now = row.ticket, time.monotonic()
        result = Finished(
            image,
            seconds=now - ticket.submitted,
            queue_seconds=row.started - ticket.submitted,
            computed=row.computed,
            skipped=row.skipped,
            rounds=row.round - ticket.round,
        )
        self._state.recent.append(now - row.started)
        self.observer.finished(ticket.settings, result)
        ticket.listener(result)

    def _is_open(self, ticket: Ticket) -> bool:
        """Return whether an image shall still be drawn; report it if it is late."""
        if ticket.cause:
            self.observer.cancelled(ticket.cause)
            return False
        if ticket.is_late():
            self._fail(ticket, "deadline", "the image was not done within the time limit")
            return False
        return True

    def _report_error(self, ticket: Ticket, error: Exception) -> None:
        if isinstance(error, UsageError):
            self._fail(ticket, "usage", str(error))
        elif out_of_memory(error):
            self._fail(ticket, "memory", "the device has too little memory for this image")
        else:
            logger.error("an image failed", exc_info=error)
            self._fail(ticket, "error", "the image could not be drawn; the server's log says why")

    def _fail(self, ticket: Ticket, cause: str, text: str) -> None:
        self.observer.cancelled(cause)
        ticket.listener(Failed(cause, text))

    def warm_up(self, sizes: Iterable[Size], *, guidance_scale: float | None = None) -> None:
        """Draw two steps of each size and number of images, before the thread starts.

        Blocks are compiled by it, for each LoRA, and a size that cannot be drawn is found out.

        Raises:
            UsageError: the model cannot draw a size, or memory does not suffice for one image of it.
        """
        # only compiled blocks have buckets, and only they need a call with each LoRA
        buckets, largest = self.settings.buckets, self.batches.limit
        loras = (None, *self.loras.names) if buckets else (None,)
        numbers = dict.fromkeys(min(n, largest) for n in buckets or (1, largest))
        for size in sizes:
            for lora in loras:
                for number in numbers:
                    self._warm(ImageSettings("", 0, size, 2, guidance_scale, lora=lora), number)

    def _warm(self, settings: ImageSettings, number: int) -> None:
        problems: list[str] = []

        def listen(report: Partial | Finished | Failed) -> None:
            if isinstance(report, Failed):
                problems.append(report.text)

        self.submit([Ticket(settings, listen) for _ in range(number)])
        while self._state.waiting or self._state.rows:
            self.round()
        if problems:
            height, width = settings.size
            raise UsageError(
                f"sizes: {width}x{height} cannot be drawn: {problems[0]}. Leave the size out."
            )
