"""Handlers of a denoiser's calls: the cache in force, and the recorder that calibrates it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.acceleration.request import Request, asks_same
from diffalign.acceleration.schedule import HISTORY, Schedule, Weights
from diffalign.acceleration.tap import Inner

logger = logging.getLogger(__name__)
INPUTS = ("hidden_states", "sample", "x")
"""Names that diffusers' denoisers have for the noisy latents."""
Place = tuple[int, int]
Tensors = list[Tensor]


def latents_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensors:
    """Return the noisy latents in a denoiser's call, one tensor or one a row."""
    value = args[0] if args else next(kwargs[n] for n in INPUTS if n in kwargs)
    return list(value) if isinstance(value, list | tuple) else [value]


def predictions_of(output: Any) -> Tensors:
    """Return the prediction in a denoiser's output, one tensor or one a row."""
    value = output[0]
    return list(value) if isinstance(value, list | tuple) else [value]


def rebuild(output: Any, predictions: Tensors) -> Any:
    """Return an output of the kind of `output` with other predictions."""
    value = type(output[0])(predictions) if isinstance(output[0], list | tuple) else predictions[0]
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**{next(iter(output.keys())): value})


@dataclass(frozen=True)
class Point:
    """Input and prediction of one computed forward."""

    step: int
    inputs: Tensors
    predictions: Tensors
    output: Any

    def fits(self, inputs: Tensors) -> bool:
        """Return whether latents have the shapes and the dtype of this point's."""
        return [(t.shape, t.dtype) for t in inputs] == [(t.shape, t.dtype) for t in self.inputs]

    @property
    def comparable(self) -> bool:
        """True if inputs and predictions have the same shapes."""
        return [t.shape for t in self.inputs] == [t.shape for t in self.predictions]


class History:
    """Last computed forwards of each forward within a step."""

    def __init__(self) -> None:
        self._points: dict[int, list[Point]] = {}

    def clear(self) -> None:
        """Forget all forwards."""
        self._points.clear()

    def add(self, slot: int, point: Point) -> None:
        """Keep a forward, and forget those that no extrapolation uses any more."""
        points = self._points.setdefault(slot, [])
        if points and not points[0].fits(point.inputs):
            points.clear()
        points.insert(0, point)
        del points[HISTORY:]

    def of(self, slot: int, inputs: Tensors) -> list[Point]:
        """Return the forwards that fit latents, the last one first."""
        points = self._points.get(slot, [])
        return points if points and points[0].fits(inputs) else []


def combine(points: Sequence[Point], inputs: Tensors, weights: Weights) -> Any:
    """Return the extrapolated output, computed in float32."""
    predictions = []
    for row, last in enumerate(points[0].predictions):
        terms = [(w, p.predictions[row]) for w, p in zip(weights.outputs, points, strict=True)]
        if weights.inputs:
            terms += [(w, p.inputs[row]) for w, p in zip(weights.inputs, points, strict=True)]
            terms.append((weights.present, inputs[row]))
        total = terms[0][1].float() * terms[0][0]
        for weight, tensor in terms[1:]:
            total = torch.add(total, tensor.float(), alpha=weight)
        predictions.append(total.to(last.dtype))
    return rebuild(points[0].output, predictions)


class _Computing:
    """Handler that computes every forward and keeps what it saw."""

    def __init__(self) -> None:
        self.history = History()

    def begin(self, request: Request) -> None:
        self.history.clear()

    def end_step(self, step: int) -> None:
        """Do nothing."""

    def compute(
        self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place
    ) -> Point:
        """Call the denoiser and return its point."""
        # a callback may change latents in place, and a CUDA graph writes its next output into the same memory
        inputs = [t.clone() for t in latents_of(args, kwargs)]
        output = inner(*args, **kwargs)
        return Point(place[0], inputs, [t.clone() for t in predictions_of(output)], output)


class Cache(_Computing):
    """Static cache in force: it extrapolates the steps that its schedule does not compute.

    A request of other noise levels than a schedule's is computed whole, with a warning.
    """

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        super().__init__()
        self.schedules = tuple(schedules)
        self.enabled = True
        self.forwards = {"computed": 0, "extrapolated": 0}
        """Number of forwards since the cache is in force."""
        self._schedule: Schedule | None = None
        self._unknown: list[Request] = []

    def begin(self, request: Request) -> None:
        super().begin(request)
        self._schedule = next((s for s in self.schedules if s.is_for(request)), None)
        if self._schedule is None and self.enabled and request not in self._unknown:
            self._unknown.append(request)
            logger.warning("cache: %s", self._why_unknown(request))

    def _why_unknown(self, request: Request) -> str:
        """Return why no schedule is for a request, and what helps."""
        if any(asks_same(s.request, request) for s in self.schedules):
            return (
                "the scheduler's noise levels or settings, such as its shift, are not those of the calibration; every "
                "step is computed. Put them back, or call `restore`, then `accelerate`."
            )
        made_for = ", ".join(str(s.steps) for s in self.schedules)
        return (
            f"this call asks for {request.get('num_inference_steps')} steps or other noise levels, and the cache was "
            f"calibrated for {made_for} steps; every step is computed. Pass `steps` and `sizes` of the call to "
            "`accelerate`."
        )

    def end_step(self, step: int) -> None:
        # free the memory after the last step
        if self._schedule is not None and step == self._schedule.steps - 1:
            self.history.clear()

    def forward(
        self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place
    ) -> Any:
        schedule = self._schedule
        if schedule is None or not self.enabled or torch.is_grad_enabled():
            return inner(*args, **kwargs)
        step, slot = place
        weights = schedule.weights.get(step, ())
        if slot < len(weights):
            inputs = latents_of(args, kwargs)
            points = self.history.of(slot, inputs)
            if len(points) >= len(weights[slot].outputs):
                self.forwards["extrapolated"] += 1
                return combine(points[: len(weights[slot].outputs)], inputs, weights[slot])
        self.forwards["computed"] += 1
        point = self.compute(inner, args, kwargs, place)
        if step < schedule.steps:
            self.history.add(slot, point)
        return point.output


Guided = Callable[[Tensors], Tensors]
"""Function from a batch's tensors to those that the scheduler sees after guidance."""


class Recorder(_Computing):
    """Handler that computes every step and records the trajectory, with guidance applied."""

    def __init__(self, guided: Guided) -> None:
        super().__init__()
        self.guided = guided
        self.request: Request = {}
        self.points: dict[Place, Point] = {}

    def begin(self, request: Request) -> None:
        super().begin(request)
        self.request, self.points = request, {}

    def forward(
        self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place
    ) -> Any:
        point = self.compute(inner, args, kwargs, place)
        self.points[place] = guided_point(point, self.guided)
        return point.output


def guided_point(point: Point, guided: Guided) -> Point:
    """Return a point as the scheduler sees it, after guidance."""
    return replace(
        point, inputs=guided(point.inputs), predictions=guided(point.predictions), output=None
    )


def flat(tensors: Tensors) -> Tensor:
    """Return all values of the tensors in one row of float64."""
    return torch.cat([t.flatten().double() for t in tensors])
