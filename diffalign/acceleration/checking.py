"""Check of an acceleration: images drawn plain and accelerated, and what is wrong with the latter."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.parts import denoiser_of

SAME = 60.0
"""PSNR in dB above which two draws of an acceleration show the same image."""
NO_EFFECT = 100.0
"""PSNR in dB above which a LoRA is without effect."""


def timed(pipeline: Any, call: Call) -> tuple[Tensor, float]:
    """Return the images of a call, and its seconds."""
    started = time.perf_counter()
    images = draw(pipeline, call)
    return images, time.perf_counter() - started


def active_adapters(pipeline: Any) -> list[str]:
    """Return the names of the denoiser's active adapters."""
    denoiser = denoiser_of(pipeline)
    if not getattr(denoiser, "peft_config", None):
        return []
    names = denoiser.active_adapters()
    return [names] if isinstance(names, str) else list(names)


@dataclass
class Reference:
    """Images of the check, and the state in which they were drawn.

    Attributes:
        pipeline: pipeline that is accelerated.
        call: prompts and settings of the images.
        plain: images (B, 3, H, W) before the acceleration, in [0, 1].
        images: images after it.
        adapters: active adapters at that time.
        floor: median PSNR in dB that is demanded.
    """

    pipeline: Any
    call: Call
    plain: Tensor
    images: Tensor
    adapters: list[str]
    floor: float

    def problems(self) -> list[str]:
        """Draw the images again, and return what is wrong with them."""
        images = draw(self.pipeline, self.call)
        adapters = active_adapters(self.pipeline)
        problems = faults_of(images)
        if problems:
            return problems
        to_before = statistics.median(psnr(images, self.images))
        if adapters != self.adapters:
            if adapters and to_before > NO_EFFECT:
                problems.append(f"the LoRA {', '.join(adapters)} has no effect on the images")
            return problems
        if to_before < SAME:
            problems.append(
                f"the images changed since `accelerate` ({to_before:.1f} dB to those drawn then): weights, "
                "scheduler or hooks are not what they were"
            )
        to_plain = statistics.median(psnr(images, self.plain))
        if to_plain < self.floor:
            problems.append(
                f"the images have {to_plain:.1f} dB to the plain ones, below the floor of {self.floor:g} dB"
            )
        return problems

    def is_plain(self) -> bool:
        """Draw the images again, and return whether they are the plain ones, pixel for pixel."""
        return torch.equal(draw(self.pipeline, self.call), self.plain)


def faults_of(images: Tensor) -> list[str]:
    """Return faults that images show by themselves: values that are not finite, or one colour."""
    if not bool(torch.isfinite(images).all()):
        return ["images hold values that are not finite"]
    flat_rows = images.flatten(2).std(-1).amax(1) < 1e-4
    if bool(flat_rows.any()):
        return [f"{int(flat_rows.sum())} of {len(images)} images have one colour only"]
    return []
