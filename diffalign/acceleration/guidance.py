"""Guidance at half its cost: in the middle of the schedule only, or with a prediction that is used twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.acceleration.cache import latents_of, predictions_of, rebuild
from diffalign.acceleration.options import INTERVAL
from diffalign.acceleration.request import Request
from diffalign.acceleration.tap import Inner

EVERY = 2
"""Steps between two computed negative predictions with "reuse"."""


class Guidance:
    """Handler that computes the positive half of a batch alone in some steps.

    The batch is [negative; positive], as diffusers' pipelines build it. With "interval" the two predictions are equal
    outside of the interval, so that no guidance is applied there. With "reuse" the difference of the two predictions is
    that of the last step with both. Any other kind is a LoRA that draws without guidance: no step computes both.
    """

    def __init__(self, pipeline: Any, kind: str, *, steps: int) -> None:
        self._pipeline, self.kind, self.steps = pipeline, kind, steps
        self._difference: Tensor | None = None
        self._steps = steps
        self.halves = 0
        """Number of forwards with half of the batch since the option is in force."""

    def begin(self, request: Request) -> None:
        self._difference = None
        self._steps = int(request.get("num_inference_steps") or self.steps)

    def end_step(self, step: int) -> None:
        """Do nothing."""

    def whole(self, step: int) -> bool:
        """Return whether a step computes both halves."""
        if self.kind == "interval":
            first, last = INTERVAL
            return first <= step / self._steps < last
        return self.kind == "reuse" and step % EVERY == 0

    def forward(
        self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, int]
    ) -> Any:
        latents = latents_of(args, kwargs)
        rows = len(latents[0])
        splits = len(latents) == 1 and rows % 2 == 0 and guides(self._pipeline)
        if not splits or torch.is_grad_enabled():
            return inner(*args, **kwargs)
        reuses = self.kind == "reuse"
        difference = self._difference
        fits = difference is not None and len(difference) == rows // 2
        if self.whole(place[0]) or (reuses and not fits):
            output = inner(*args, **kwargs)
            if reuses:
                negative, positive = predictions_of(output)[0].chunk(2)
                self._difference = positive - negative
            return output
        self.halves += 1
        half = {name: second_half(value, rows) for name, value in kwargs.items()}
        output = inner(*(second_half(value, rows) for value in args), **half)
        positive = predictions_of(output)[0]
        negative = positive - difference if reuses and difference is not None else positive
        return rebuild(output, [torch.cat([negative, positive])])


def guides(pipeline: Any) -> bool:
    """Return whether a pipeline's call doubles its batch for guidance."""
    return bool(getattr(pipeline, "do_classifier_free_guidance", False))


def second_half(value: Any, rows: int) -> Any:
    """Return the second half of an argument that has so many rows.

    Return other arguments as they are.
    """
    if isinstance(value, Mapping):
        return {key: second_half(part, rows) for key, part in value.items()}
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows:
        return value[rows // 2 :]
    return value
