"""Measure drop-in acceleration on the shipped models: time, PSNR, GenEval, and the way back.

Two copies of a model are timed in turns, one plain and one accelerated, on one core. The seconds are those of the
processor, so that other programs do not count. Prompts of the calibration and of the measurement are disjoint.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import diffalign
from benchmarks.common.record import BenchOptions, spread
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.score import evaluate_model
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward

MODELS = ("shapes-flux", "shapes-sd3", "shapes-sd")
STEPS = 28
TARGETS = {"shapes-flux": 50.0, "shapes-sd3": 50.0, "shapes-sd": 48.0}
"""PSNR in dB that the cache is calibrated for."""
REPEATS = 7
CALIBRATION = 8
"""Number of prompts of the calibration."""


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure every model with every seed; a seed sets prompts and noise."""
    torch.set_num_threads(1)
    names = options.select(MODELS)
    arms = {}
    for name in names:
        rows = [_measured(name, seed, options.quick) for seed in range(options.seeds)]
        keys = [k for k, v in rows[0].items() if isinstance(v, float)]
        figures = {k: spread(row[k] for row in rows) for k in keys}
        arms[name] = {**figures, "computed": [row["computed"] for row in rows]}
    middle = {
        name: {k: v["median"] for k, v in arm.items() if isinstance(v, dict)}
        for name, arm in arms.items()
    }
    headline = {
        "lossless_ratio": min(m["lossless_ratio"] for m in middle.values()),
        "cache_ratio": min(m["cache_ratio"] for m in middle.values()),
        "cache_psnr": min(m["cache_psnr"] for m in middle.values()),
        "geneval_drop": max(m["geneval_drop"] for m in middle.values()),
        "restored": all(arm["restored"]["low"] == 1 for arm in arms.values()),
    }
    return {"headline": headline, "arms": arms, "steps": STEPS, "repeats": REPEATS}


def _measured(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Return the figures of one model and seed."""
    plain, fast = (load_model(name, dtype=torch.float32) for _ in range(2))
    calibration = _call(plain, "shapes:train", CALIBRATION, seed)
    test = _call(plain, "shapes:held_out", 8, 1000 + seed)
    images = draw(plain.pipeline, test)
    size = calibration.height, calibration.width
    common: dict[str, Any] = {"steps": STEPS, "sizes": (size,), "check": 0}
    diffalign.accelerate(fast.pipeline, "lossless", **common)
    lossless = _ratio(plain, fast, test)
    same = psnr(draw(fast.pipeline, test), images)
    diffalign.restore(fast.pipeline)
    diffalign.accelerate(
        fast.pipeline,
        "lossless",
        cache=TARGETS[name],
        prompts=calibration.prompts,
        seed=calibration.seed,
        **common,
    )
    (schedule,) = diffalign.acceleration(fast.pipeline).plan.schedules
    ratio = _ratio(plain, fast, test)
    accelerated = draw(fast.pipeline, test)
    values = psnr(accelerated, images)
    alone = [psnr(_alone(fast, test, i), accelerated[i : i + 1])[0] for i in (0, 1)]
    drop = _geneval(plain, seed, quick) - _geneval(fast, seed, quick)
    diffalign.restore(fast.pipeline)
    restored = torch.equal(draw(fast.pipeline, test), images)
    return {
        "lossless_ratio": lossless,
        "lossless_psnr": min(same),
        "cache_ratio": ratio,
        "cache_psnr": statistics.median(values),
        "cache_mean_psnr": statistics.mean(values),
        "cache_worst_psnr": min(values),
        "alone_psnr": min(alone),
        "geneval_drop": drop,
        "restored": float(restored),
        "computed": list(schedule.computed),
    }


def _call(model: Any, source: str, n: int, seed: int) -> Call:
    """Return a call with n prompts of a set, drawn with a seed."""
    prompts = [p.text for p in load_prompts(source)]
    order = np.random.default_rng(seed).permutation(len(prompts))[:n]
    height, width = model.default_size
    return Call(STEPS, height, width, tuple(prompts[i] for i in order), {}, seed)


def _alone(model: Any, call: Call, i: int) -> torch.Tensor:
    """Return image i of a call, drawn alone."""
    one = Call(call.steps, call.height, call.width, (call.prompts[i],), {}, call.seed + i)
    return draw(model.pipeline, one)


def _ratio(plain: Any, fast: Any, call: Call) -> float:
    """Return the median over pairs of the plain pipeline's seconds to the accelerated one's."""
    ratios = []
    for turn in range(REPEATS):
        # the first of a pair changes, so that a slowing machine favours neither
        order = (plain, fast) if turn % 2 else (fast, plain)
        seconds = {id(m): _seconds(partial(draw, m.pipeline, call)) for m in order}
        ratios.append(seconds[id(plain)] / seconds[id(fast)])
    return statistics.median(ratios)


def _seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def _geneval(model: Any, seed: int, quick: bool) -> float:
    """Return GenEval on the held-out prompts, at the same steps."""
    prompts: Sequence[Any] = load_prompts("shapes:held_out")
    reward = CompositeReward.from_config({"verifier": 1.0})
    drawing = Drawing(
        num_inference_steps=STEPS,
        images_per_task=4 if quick else 128,
        seed=seed,
        micro_batch_size=16,
    )
    return float(evaluate_model(model, prompts, reward.score, drawing).tasks["overall"])
