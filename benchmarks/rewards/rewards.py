"""How fast images are scored, in how much memory, and how much of it is preprocessing: ours on tensors, and the
original processors on Pillow images; and the two ways to a Frechet distance. Random weights: tiny on a CPU, of the
published sizes on a GPU."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import _compute_fid
from transformers import (
    CLIPImageProcessorPil,
    Mask2FormerImageProcessorPil,
    Qwen2VLImageProcessorPil,
)

from benchmarks.common.record import BenchOptions
from benchmarks.rewards.models import PUBLISHED_SIZE, builders
from diffalign.evaluation.distances import frechet_distance, moments
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import ClipReward
from diffalign.rewards.geneval import GenEvalReward
from diffalign.rewards.hpsv2 import HPSv21Reward
from diffalign.rewards.hpsv3 import HPSv3Reward, picture
from diffalign.rewards.image_reward import ImageReward
from diffalign.rewards.preprocessing import Preprocessing
from diffalign.rewards.weights import device
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import render, sample_scene

SIZE = 512
"""Pixels per side of the images; Shapes has its own."""
FID = "fid"
DIMENSIONS, FEW_DIMENSIONS = 2048, 256
"""Of the features whose distance is timed: Inception's, and with --quick."""
ON_SHAPES = ("verifier", "flatness", "shapes_clip")
"""Arms that are shown scenes of Shapes."""
SLOW = {"geneval": 4, "geneval_compat": 4, "hpsv3": 4, "ocr": 4, PUBLISHED_SIZE: 8}
"""Arms that get so many times fewer images."""
PROMPT: dict[str, Any] = {
    "prompt": 'a photo of a red car with "HELLO"',
    "tag": "colors",
    "include": [{"class": "car", "count": 1, "color": "red"}],
}


def run(options: BenchOptions) -> dict[str, Any]:
    """Every reward of the registry, each alone in a process; preprocessing by the original's processor, too."""
    n, repeats = (8, 3) if options.quick else (32, 5)
    known = [*builders(real=False), FID]
    if options.quick and options.arms is None:
        known.remove(PUBLISHED_SIZE)  # minutes on a CPU
    arms = {}
    for name in options.chosen(known):
        size = FEW_DIMENSIONS if options.quick else DIMENSIONS
        count = size if name == FID else max(2, n // SLOW.get(name, 1))
        arms[name] = _alone(name, count, repeats)
    headline = {
        f"preprocessing_{key}_{name}": arm[key]
        for name, arm in arms.items()
        for key in ("share", "share_before")
        if key in arm
    }
    if FID in arms:
        headline["fid_torchmetrics_over_ours"] = arms[FID]["torchmetrics_over_ours"]
    return {
        "headline": headline,
        "weights": "published sizes, random" if torch.cuda.is_available() else "tiny, random",
        "images": n,
        "pixels": SIZE,
        "arms": arms,
    }


def _alone(arm: str, count: int, repeats: int) -> dict[str, Any]:
    """An arm in a process of its own, whose peak of memory is the arm's."""
    command = [sys.executable, "-m", __name__, arm, str(count), str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arm: str, count: int, repeats: int) -> dict[str, Any]:
    """Of one arm: `count` images, or dimensions of `fid`. `memory_mib`: the process's peak beyond what imports take."""
    imported = peak_mib()
    torch.manual_seed(0)
    if arm == FID:
        return frechet(count, repeats) | {"memory_mib": round(peak_mib() - imported)}
    images, entries = pictures_of(arm, count)
    reward = builders(real=torch.cuda.is_available())[arm]()
    reward.prepare()
    work = partial(reward.score, images, [e["prompt"] for e in entries], entries)
    assert work().mask.all(), f"{arm} failed"
    seconds = timed(work, repeats)
    found = {
        "images": count,
        "images_per_second": round(count / seconds, 2),
        "memory_mib": round(peak_mib() - imported),
    }
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found | preprocessing(reward, images, seconds, repeats)


def peak_mib() -> float:
    """The most memory that this process has had. (On Linux `ru_maxrss` begins at what the parent had.)"""
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def pictures_of(arm: str, count: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images (count, 3, H, W) uint8 on this device and a prompt's metadata for each that the arm can judge."""
    rng = np.random.default_rng(0)
    if arm in ON_SHAPES:
        entries = prompts("held_out")[:count]
        drawn = np.stack([render(sample_scene(e, rng)) for e in entries])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).to(device()), entries
    values = rng.integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)
    return torch.from_numpy(values).to(device()), [PROMPT] * count


def frechet(dimensions: int, repeats: int) -> dict[str, Any]:
    """Seconds of the Frechet distance of two Gaussians by torchmetrics (eigenvalues of a general matrix) and by ours
    (of symmetric ones), and how far the results differ as a share."""
    mix = torch.randn(dimensions, dimensions) / dimensions**0.5
    a = moments(torch.randn(2 * dimensions, dimensions))
    b = moments(torch.randn(2 * dimensions, dimensions) @ mix + 0.1)
    theirs = partial(_compute_fid, a.mean, a.covariance, b.mean, b.covariance)
    ours = partial(frechet_distance, a, b)
    before, after = timed(theirs, min(repeats, 3)), timed(ours, repeats)
    return {
        "dimensions": dimensions,
        "torchmetrics_seconds": round(before, 3),
        "seconds": round(after, 3),
        "torchmetrics_over_ours": round(before / after, 2),
        "relative_difference": abs(float(theirs()) / ours() - 1),
    }


def preprocessing(reward: Reward, images: Tensor, total: float, repeats: int) -> dict[str, float]:
    """Seconds of preprocessing and its share of the whole; where the original has a processor, how much longer that
    takes from the same tensors, and what its share would be. Nothing for rewards without preprocessing."""
    ours, original = steps(reward)
    if ours is None:
        return {}
    seconds = timed(lambda: ours(images), repeats)
    total = max(total, seconds)  # with tiny weights there is little else
    found = {"preprocessing_seconds": round(seconds, 4), "share": round(seconds / total, 3)}
    if original is None:
        return found
    before = timed(lambda: original(images=pictures(images), return_tensors="np"), repeats)
    return found | {
        "share_before": round(before / (total - seconds + before), 3),
        "original_over_ours": round(before / seconds, 2),
    }


def steps(reward: Reward) -> tuple[Callable[[Tensor], Any] | None, Any]:
    """The preprocessing of a reward, and the processor of its original; None for what there is not."""
    if isinstance(reward, GenEvalReward):
        assert reward._detector is not None
        size = {"shortest_edge": 800, "longest_edge": 1333}
        return reward._detector.preprocessing, Mask2FormerImageProcessorPil(size=size)
    if isinstance(reward, HPSv3Reward):
        assert reward._model is not None
        vision = reward._model.base.config.vision_config
        pixels = 256 * (vision.patch_size * vision.spatial_merge_size) ** 2
        original = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)
        return lambda images: picture(images, vision), original
    if isinstance(reward, HPSv21Reward):
        return reward.scorer.preprocessing, None  # the release's own is not in transformers
    if isinstance(reward, ClipReward):
        ours: Preprocessing = reward.scorer.preprocessing
    elif isinstance(reward, ImageReward):
        assert reward._model is not None
        ours = Preprocessing(reward._model.vision.config.image_size)
    else:
        return None, None
    crop = {"height": ours.size, "width": ours.size}
    return ours, CLIPImageProcessorPil(size={"shortest_edge": ours.size}, crop_size=crop)


def pictures(images: Tensor) -> Sequence[Image.Image]:
    """What a processor on Pillow has to be given."""
    return [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).cpu().numpy()]


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one round that is not counted."""
    found = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("arm")
    parser.add_argument("count", type=int)
    parser.add_argument("repeats", type=int)
    print(json.dumps(measure(**vars(parser.parse_args()))))
