"""Scores images in a thread of its own while the denoiser draws the next: rewards on another processor cost no time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.evaluation.score import Score
from diffalign.types import RewardOutput

_Jobs = queue.SimpleQueue[tuple[Future[RewardOutput], tuple[Any, ...]] | None]


class RewardTimeout(UserError, TimeoutError):
    """A reward gave no answer in time."""


class BackgroundScorer:
    """Scorer of a rollout's parts beside the rollout.

    First `submit` the parts, then `collect` their rewards in that order; or call the scorer as the score that it wraps.
    `timeout`: seconds to wait for a part after the part before it; None waits for ever. `overlap` False waits in
    `submit`: on a CPU nothing is won by two at a time, and a reward model's attention would use whatever kernel the
    denoiser has chosen at that moment. The thread lives until `collect`, and is a daemon: a reward that hangs cannot
    keep the process from ending.
    """

    def __init__(self, score: Score, *, timeout: float | None = None, overlap: bool = True) -> None:
        self._score = score
        self._timeout = timeout
        self._overlap = overlap
        self._waiting: list[Future[RewardOutput]] = []
        self._jobs: _Jobs | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> RewardOutput:
        self.submit(images, prompts, metadata)
        return self.collect()

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> None:
        """Score (B, 3, H, W) uint8 images on the CPU, after the images before them."""
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            arguments = (self._jobs, device)
            threading.Thread(target=self._work, args=arguments, name="rewards", daemon=True).start()
        future: Future[RewardOutput] = Future()
        self._waiting.append(future)
        self._jobs.put((future, (images, prompts, metadata)))
        if not self._overlap:
            wait([future], self._timeout)

    def collect(self) -> RewardOutput:
        """Return the rewards of everything submitted since the last call.

        Raises:
            RewardTimeout: a part took longer than `timeout` after the part before it.
        """
        waiting, self._waiting = self._waiting, []
        jobs, self._jobs = self._jobs, None
        if jobs is not None:
            jobs.put(None)
        parts = []
        for future in waiting:
            done, _ = wait([future], self._timeout)
            if not done:
                raise RewardTimeout(
                    f"no reward for {self._timeout:g} seconds (rollout.reward_timeout)"
                )
            parts.append(future.result())
        return RewardOutput.cat(parts)

    @torch.no_grad()
    def _work(self, jobs: _Jobs, device: int | None) -> None:
        if device is not None:  # of the thread that submits; a new one starts on the first
            torch.cuda.set_device(device)
            # one for all rollouts: torch's allocator keeps freed memory for the stream that it was of
            self._stream = self._stream or torch.cuda.Stream()
        # images come from the CPU, so that a stream of its own needs no other to wait for
        with nullcontext() if device is None else torch.cuda.stream(self._stream):
            while (job := jobs.get()) is not None:
                future, arguments = job
                try:
                    future.set_result(self._score(*arguments))
                except BaseException as error:
                    future.set_exception(error)
