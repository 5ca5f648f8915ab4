"""Measure drop-in acceleration on the shipped models: time, PSNR, GenEval, and the way back.

Two copies of a model are timed in turns, one plain and one accelerated, on one core. The seconds are those of the
processor, so that other programs do not count. Prompts of the calibration and of the measurement are disjoint. All
images, those of GenEval too, are drawn with the default guidance of the pipeline's call.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import diffalign
from benchmarks.common.record import BenchOptions, spread
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.options import PRESETS
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.score import evaluate_model
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward

MODELS = ("shapes-flux", "shapes-sd3", "shapes-sd")
"""Models, each of which is an arm."""
STEPS = 28
TARGETS = {"shapes-flux": 50.0, "shapes-sd3": 50.0, "shapes-sd": 48.0}
"""PSNR in dB that the cache is calibrated for."""
REPEATS = 7
"""Number of pairs of calls that are timed; one with `quick`."""
CALIBRATION, TEST = 8, 8
"""Numbers of prompts of the calibration and of the measurement; two with `quick`."""
PER_TASK = 128
"""Number of images of each task for GenEval; four with `quick`."""
FIGURES = (
    "lossless_ratio",
    "lossless_psnr",
    "cache_ratio",
    "cache_psnr",
    "cache_mean_psnr",
    "cache_worst_psnr",
    "alone_psnr",
    "geneval_drop",
    "restored",
)
"""Names of the figures of one model and seed."""
Figures = dict[str, Any]


def run(options: BenchOptions) -> Figures:
    """Measure every model with every seed; a seed sets prompts and noise.

    A model and seed that the work folder holds are not measured again.
    """
    torch.set_num_threads(1)
    arms = {name: _arm(name, options) for name in options.select(MODELS)}
    middle = {
        name: {k: v["median"] for k, v in arm.items() if k in FIGURES} for name, arm in arms.items()
    }
    headline = {
        "lossless_ratio": min(m["lossless_ratio"] for m in middle.values()),
        "cache_ratio": min(m["cache_ratio"] for m in middle.values()),
        "cache_psnr": min(m["cache_psnr"] for m in middle.values()),
        "geneval_drop": max(m["geneval_drop"] for m in middle.values()),
        "restored": all(arm["restored"]["low"] == 1 for arm in arms.values()),
    }
    return {"headline": headline, "arms": arms, "steps": STEPS, "repeats": _sizes(options)[0]}


def _arm(name: str, options: BenchOptions) -> Figures:
    """Return the figures of one model over all seeds."""
    repeats, prompts, per_task = _sizes(options)
    key = {"steps": STEPS, "target": TARGETS[name], "presets": PRESETS, "sizes": _sizes(options)}
    rows = [
        options.cached(
            name,
            seed,
            partial(_Measurement(name, seed, repeats, prompts).figures, per_task),
            key=key,
        )
        for seed in range(options.seeds)
    ]
    figures = {k: spread(r[k] for r in rows) for k in FIGURES}
    presets = {
        preset: {k: spread(r["presets"][preset][k] for r in rows) for k in ("ratio", "psnr")}
        for preset in PRESETS
    }
    return {
        **figures,
        "presets": presets,
        "guidance_scale": rows[0]["guidance_scale"],
        "computed": [r["computed"] for r in rows],
    }


def _sizes(options: BenchOptions) -> tuple[int, int, int]:
    """Return the numbers of timed pairs, of prompts, and of images of each task."""
    return (1, 2, 4) if options.quick else (REPEATS, TEST, PER_TASK)


class _Measurement:
    """Two copies of a model, one of which is accelerated."""

    def __init__(self, name: str, seed: int, repeats: int, prompts: int) -> None:
        self._name, self._seed, self._repeats, self._prompts = name, seed, repeats, prompts

    def figures(self, per_task: int) -> Figures:
        """Return the figures of the model and the seed."""
        self._plain, self._fast = (load_model(self._name, dtype=torch.float32) for _ in range(2))
        calls = inspect.signature(type(self._plain.pipeline).__call__).parameters
        self._guidance = float(calls["guidance_scale"].default)
        self._test = self._call("shapes:held_out", self._prompts, 1000 + self._seed)
        self._images = draw(self._plain.pipeline, self._test)
        presets = {name: self._preset(name) for name in PRESETS}
        cache = self._cache(per_task)
        restored = torch.equal(draw(self._fast.pipeline, self._test), self._images)
        return {
            "lossless_ratio": presets["lossless"]["ratio"],
            "lossless_psnr": presets["lossless"]["worst_psnr"],
            **cache,
            "restored": float(restored),
            "presets": presets,
            "guidance_scale": self._guidance,
        }

    def _preset(self, name: str) -> Figures:
        """Return time, PSNR and options of a preset."""
        with self._accelerated(name):
            applied = diffalign.acceleration(self._fast.pipeline).applied
            ratio = self._ratio()
            values = psnr(draw(self._fast.pipeline, self._test), self._images)
        return {
            "ratio": ratio,
            "psnr": statistics.median(values),
            "worst_psnr": min(values),
            "options": {option: str(value) for option, value in applied.items()},
        }

    def _cache(self, per_task: int) -> Figures:
        """Return the figures of the static cache alone, calibrated for the model's target."""
        with self._accelerated("lossless", cache=TARGETS[self._name]):
            (schedule,) = diffalign.acceleration(self._fast.pipeline).plan.schedules
            ratio = self._ratio()
            images = draw(self._fast.pipeline, self._test)
            values = psnr(images, self._images)
            alone = [psnr(self._alone(i), images[i : i + 1])[0] for i in (0, 1)]
            drop = self._geneval(self._plain, per_task) - self._geneval(self._fast, per_task)
        return {
            "cache_ratio": ratio,
            "cache_psnr": statistics.median(values),
            "cache_mean_psnr": statistics.mean(values),
            "cache_worst_psnr": min(values),
            "alone_psnr": min(alone),
            "geneval_drop": drop,
            "computed": list(schedule.computed),
        }

    def _accelerated(self, preset: str, **choices: Any) -> Any:
        """Return the block in which the second copy is accelerated, without a check."""
        calibration = self._call("shapes:train", min(CALIBRATION, self._prompts), self._seed)
        arguments: Mapping[str, Any] = {
            "steps": STEPS,
            "sizes": ((calibration.height, calibration.width),),
            "batch_sizes": (1, self._prompts),
            "arguments": calibration.arguments,
            "prompts": calibration.prompts,
            "seed": calibration.seed,
            "check": 0,
        }
        return diffalign.accelerated(self._fast.pipeline, preset, **arguments, **choices)

    def _call(self, source: str, n: int, seed: int) -> Call:
        """Return a call with n prompts of a set, drawn with a seed."""
        prompts = [p.text for p in load_prompts(source)]
        order = np.random.default_rng(seed).permutation(len(prompts))[:n]
        height, width = self._plain.default_size
        guidance = {"guidance_scale": self._guidance}
        return Call(STEPS, height, width, tuple(prompts[i] for i in order), guidance, seed)

    def _alone(self, i: int) -> torch.Tensor:
        """Return image i of the test, drawn alone by the accelerated copy."""
        call = self._test
        one = replace(call, prompts=(call.prompts[i],), seed=call.seed + i)
        return draw(self._fast.pipeline, one)

    def _ratio(self) -> float:
        """Return the median over pairs of the plain pipeline's seconds to the accelerated one's."""
        ratios = []
        for turn in range(self._repeats):
            # the first of a pair changes, so that a slowing machine favours neither
            order = (self._plain, self._fast) if turn % 2 else (self._fast, self._plain)
            seconds = {id(m): _seconds(partial(draw, m.pipeline, self._test)) for m in order}
            ratios.append(seconds[id(self._plain)] / seconds[id(self._fast)])
        return statistics.median(ratios)

    def _geneval(self, model: Any, per_task: int) -> float:
        """Return GenEval on the held-out prompts, at the same steps and guidance."""
        prompts: Sequence[Any] = load_prompts("shapes:held_out")
        reward = CompositeReward.from_config({"verifier": 1.0})
        drawing = Drawing(
            num_inference_steps=STEPS,
            guidance_scale=self._guidance,
            images_per_task=per_task,
            seed=self._seed,
            micro_batch_size=16,
        )
        return float(evaluate_model(model, prompts, reward.score, drawing).tasks["overall"])


def _seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started
