"""Images that clients ask for, and what the engine reports about each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from diffalign.types import Size

PLAIN = "plain"
"""Name of the mode in which every step is computed with full guidance."""


@dataclass(frozen=True)
class ImageSettings:
    """Settings of one image.

    Attributes:
        seed: seed of the image's own generator.
        size: (height, width) in pixels.
        guidance_scale: None or 1 means no classifier-free guidance.
        lora: name of a LoRA on the engine's shelf; None for the base model.
        mode: name of one of the engine's modes.
        partial_images: number of images that are reported before the last step.
    """

    prompt: str
    seed: int
    size: Size
    num_inference_steps: int
    guidance_scale: float | None = None
    negative_prompt: str = ""
    lora: str | None = None
    mode: str = PLAIN
    partial_images: int = 0


@dataclass(frozen=True)
class Partial:
    """Image (3, H, W) uint8 that the prediction of an early step implies."""

    index: int
    image: Tensor


@dataclass(frozen=True)
class Finished:
    """Finished image.

    Attributes:
        image: (3, H, W) uint8 on the CPU.
        seconds: time since the image was asked for.
        queue_seconds: time before its first step.
        computed: number of steps that the denoiser computed.
        skipped: number of steps that the cache extrapolated.
        rounds: number of the engine's rounds that began between the request and the first step.
    """

    image: Tensor
    seconds: float
    queue_seconds: float
    computed: int
    skipped: int
    rounds: int


@dataclass(frozen=True)
class Failed:
    """Image that is not drawn.

    Attributes:
        cause: "deadline", "memory", "not_finite", "error", "shutdown" or "usage".
        text: what is wrong, for the client.
    """

    cause: str
    text: str


Report = Partial | Finished | Failed
Listener = Callable[[Report], None]
"""Function that the engine's thread calls with each report of one image."""


@dataclass(eq=False)
class Ticket:
    """Place of one image in the engine.

    Attributes:
        deadline: value of `time.monotonic` after which the image is given up; None for none.
        cause: why the image is cancelled; empty while it shall be drawn.
        round: number of the engine's round in which the image was asked for.
    """

    settings: ImageSettings
    listener: Listener
    deadline: float | None = None
    cause: str = ""
    round: int = 0
    submitted: float = field(default_factory=time.monotonic)

    def cancel(self, cause: str) -> None:
        """Give the image up before its next step."""
        self.cause = self.cause or cause

    def is_late(self) -> bool:
        """Return whether the deadline is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline
