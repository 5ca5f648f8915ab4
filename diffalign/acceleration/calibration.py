"""Calibration of the static cache on a few prompts."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.acceleration.cache import Cache, Recorder, flat
from diffalign.acceleration.conditions import check_cache
from diffalign.acceleration.drawing import Call, draw, guidance_of, psnr
from diffalign.acceleration.schedule import Moments, Schedule, choose, fewest, weights_for
from diffalign.acceleration.tap import Chain, Handler, Tap

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


TILTS = (1.0, 3.0)
"""Weights of early errors that are tried, because their growth depends on the model."""


def calibrate(
    pipeline: Any,
    call: Call,
    *,
    target: float,
    computed: int | None = None,
    inside: tuple[Handler, ...] = (),
) -> Schedule:
    """Return the schedule with the fewest computed steps that reaches a PSNR.

    Args:
        pipeline: a diffusers pipeline.
        call: prompts, size and steps of the trajectories.
        target: PSNR in dB to the plain images that half of the images reach.
        computed: number of computed steps; None searches for it.
        inside: handlers that are in force inside of the cache.

    Raises:
        UsageError: the cache cannot work with the pipeline (`conditions.check_cache`), or as in `schedule.choose`.
    """
    check_cache(pipeline, steps=call.steps)
    calibration = Calibration(pipeline, call, inside)
    if computed is not None:
        return calibration.best(computed)
    low, high = fewest(calibration.moments.steps), calibration.moments.steps
    best = None
    while low < high:
        middle = (low + high) // 2
        schedule = calibration.best(middle)
        if schedule.measured["median_psnr"] >= target:
            high, best = middle, schedule
        else:
            low = middle + 1
    return best or calibration.best(calibration.moments.steps)


class Calibration:
    """Recorded trajectories of a call, from which schedules are made and measured."""

    def __init__(self, pipeline: Any, call: Call, inside: tuple[Handler, ...] = ()) -> None:
        self._pipeline, self._call, self._inside = pipeline, call, inside
        recorder = Recorder(guidance_of(pipeline))
        self.plain = self._draw(recorder)
        self.request = recorder.request
        self.moments = moments_of(pipeline.scheduler, recorder)

    def best(self, computed: int) -> Schedule:
        """Return the better of the sets with so many computed steps."""
        sets = {choose(self.moments, computed, tilt=tilt) for tilt in TILTS}
        schedules = [self._measured(s) for s in sorted(sets)]
        return max(schedules, key=lambda s: s.measured["median_psnr"])

    def _measured(self, computed: Sequence[int]) -> Schedule:
        """Return the schedule of a set of steps, with its PSNR."""
        weights = weights_for(self.moments, computed)
        schedule = Schedule(self.request, self.moments.steps, tuple(computed), weights)
        values = psnr(self._draw(Cache([schedule])), self.plain)
        figures = {"median_psnr": statistics.median(values), "worst_psnr": min(values)}
        logger.info(
            "cache: %d of %d steps: %.1f dB",
            *(len(computed), self.moments.steps, figures["median_psnr"]),
        )
        return replace(schedule, measured=figures)

    def _draw(self, handler: Handler) -> Tensor:
        tap = Tap(self._pipeline, Chain((handler, *self._inside)))
        try:
            return draw(self._pipeline, self._call)
        finally:
            tap.remove()


def steps_of(recorder: Recorder) -> int:
    """Return the number of steps of a recorded trajectory."""
    return 1 + max(step for step, _ in recorder.points)


def moments_of(scheduler: Any, recorder: Recorder) -> Moments:
    """Return the inner products of a recorded trajectory, over all forwards of its steps."""

    steps = steps_of(recorder)
    slots = [slot for step, slot in recorder.points if step == 0]
    comparable = all(p.comparable for p in recorder.points.values())
    grams = []
    for slot in slots:
        points = [recorder.points[step, slot] for step in range(steps)]
        rows = [flat(p.predictions) for p in points]
        rows += [flat(p.inputs) if comparable else torch.zeros_like(rows[0]) for p in points]
        matrix = torch.stack(rows)
        grams.append((matrix @ matrix.T).cpu().numpy())
    return Moments(tuple(grams), step_sizes(scheduler, steps), comparable)


def step_sizes(scheduler: Any, steps: int) -> np.ndarray:
    """Return (steps,) factors from an error of a prediction to one of the clean latents."""
    import numpy as np

    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == steps + 1:
        return np.abs(np.diff(np.asarray(torch.as_tensor(sigmas).double().cpu())))
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or len(scheduler.timesteps) != steps:
        return np.full(steps, 1.0 / steps)
    alphas = np.asarray(table.double().cpu())
    at = np.asarray(scheduler.timesteps.long().cpu())
    noise = np.sqrt((1 - alphas[at]) / alphas[at])
    sizes = np.abs(np.diff(np.append(noise, 0.0)))
    if scheduler.config.get("prediction_type") == "v_prediction":
        sizes = sizes * np.sqrt(alphas[at])
    return sizes
