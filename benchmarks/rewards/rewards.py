"""Measure the speed and memory of rewards, and the share of preprocessing.

Preprocessing on tensors is compared with the original processors on Pillow images, and two ways of computing a Frechet
distance with each other. Weights are random: tiny on a CPU, of the published sizes on a GPU.
"""

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
"""Pixels per side of the images. Shapes uses its own size."""
FID = "fid"
DIMENSIONS, FEW_DIMENSIONS = 2048, 256
"""Dimensions of the features of the Frechet distance: Inception's, and for quick runs."""
ON_SHAPES = ("verifier", "flatness", "shapes_clip")
"""Arms that score scenes of Shapes."""
SLOW = {"geneval": 4, "geneval_compat": 4, "hpsv3": 4, "ocr": 4, PUBLISHED_SIZE: 8}
"""Divisors of the number of images for slow arms."""
PROMPT: dict[str, Any] = {
    "prompt": 'a photo of a red car with "HELLO"',
    "tag": "colors",
    "include": [{"class": "car", "count": 1, "color": "red"}],
}


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure every registered reward in a process of its own.

    Where the original has a processor, its preprocessing is measured, too.
    """
    n, repeats = (8, 3) if options.quick else (32, 5)
    names = [*builders(real=False), FID]
    if options.quick and options.arms is None:
        # This reward takes minutes on a CPU.
        names.remove(PUBLISHED_SIZE)
    arms = {}
    for name in options.select(names):
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
    """Measure an arm in a process of its own, to get its own peak memory."""
    command = [sys.executable, "-m", __name__, arm, str(count), str(repeats)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def measure(arm: str, count: int, repeats: int) -> dict[str, Any]:
    """Measure one arm on `count` images; for `fid`, `count` is the number of dimensions.

    The figure `memory_mib` is the process's peak without the memory of imports.
    """
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
    figures = {
        "images": count,
        "images_per_second": round(count / seconds, 2),
        "memory_mib": round(peak_mib() - imported),
    }
    if torch.cuda.is_available():
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures | preprocessing(reward, images, seconds, repeats)


def peak_mib() -> float:
    """Return the peak memory of this process in MiB.

    On Linux `ru_maxrss` starts at the parent's value, so /proc is read there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    # The unit is bytes on macOS and KiB elsewhere.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def pictures_of(arm: str, count: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return images (count, 3, H, W) uint8 on this device and their prompt metadata."""
    rng = np.random.default_rng(0)
    if arm in ON_SHAPES:
        entries = prompts("held_out")[:count]
        scenes = np.stack([render(sample_scene(e, rng)) for e in entries])
        return torch.from_numpy(scenes).permute(0, 3, 1, 2).to(device()), entries
    values = rng.integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)
    return torch.from_numpy(values).to(device()), [PROMPT] * count


def frechet(dimensions: int, repeats: int) -> dict[str, Any]:
    """Time the Frechet distance of two Gaussians by torchmetrics and by this suite.

    The first takes eigenvalues of a general matrix, the second of symmetric ones. The result also has the relative
    difference of the two distances.
    """
    mix = torch.randn(dimensions, dimensions) / dimensions**0.5
    a = moments(torch.randn(2 * dimensions, dimensions))
    b = moments(torch.randn(2 * dimensions, dimensions) @ mix + 0.1)
    general = partial(_compute_fid, a.mean, a.covariance, b.mean, b.covariance)
    symmetric = partial(frechet_distance, a, b)
    before, after = timed(general, min(repeats, 3)), timed(symmetric, repeats)
    return {
        "dimensions": dimensions,
        "torchmetrics_seconds": round(before, 3),
        "seconds": round(after, 3),
        "torchmetrics_over_ours": round(before / after, 2),
        "relative_difference": abs(float(general()) / symmetric() - 1),
    }


def preprocessing(reward: Reward, images: Tensor, total: float, repeats: int) -> dict[str, float]:
    """Time a reward's preprocessing and return its share of `total` seconds.

    If the original has a processor, return also its time on the same tensors relative to this suite's, and the share
    that it would have. Return {} for rewards without preprocessing.
    """
    on_tensors, original = steps(reward)
    if on_tensors is None:
        return {}
    seconds = timed(lambda: on_tensors(images), repeats)
    # With tiny weights preprocessing is nearly everything, and its time can exceed the total by noise.
    total = max(total, seconds)
    figures = {"preprocessing_seconds": round(seconds, 4), "share": round(seconds / total, 3)}
    if original is None:
        return figures
    before = timed(lambda: original(images=pictures(images), return_tensors="np"), repeats)
    return figures | {
        "share_before": round(before / (total - seconds + before), 3),
        "original_over_ours": round(before / seconds, 2),
    }


def steps(reward: Reward) -> tuple[Callable[[Tensor], Any] | None, Any]:
    """Return a reward's preprocessing and its original's processor; None for a missing one."""
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
        # The processor of the release is not in transformers.
        return reward.scorer.preprocessing, None
    if isinstance(reward, ClipReward):
        on_tensors: Preprocessing = reward.scorer.preprocessing
    elif isinstance(reward, ImageReward):
        assert reward._model is not None
        on_tensors = Preprocessing(reward._model.vision.config.image_size)
    else:
        return None, None
    size = on_tensors.size
    crop = {"height": size, "width": size}
    return on_tensors, CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)


def pictures(images: Tensor) -> Sequence[Image.Image]:
    """Convert images to the Pillow images that the original processors take."""
    return [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).cpu().numpy()]


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of `repeats` calls after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("arm")
    parser.add_argument("count", type=int)
    parser.add_argument("repeats", type=int)
    print(json.dumps(measure(**vars(parser.parse_args()))))
