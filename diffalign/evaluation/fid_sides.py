"""Both sides of a FID: the features of the generated images and of the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from diffalign.core.versions import versions
from diffalign.data.images import read_folder
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.fid import (
    Batches,
    FeatureSet,
    Network,
    distance_intervals,
    drawn_batches,
    extract,
    folder_batches,
    measure,
    model_batches,
    warnings,
)
from diffalign.evaluation.score import Progress
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.shapes.world import render, sample_scene

SHAPES_IMAGES = 8
"""Drawn scenes per prompt, where Shapes is the reference."""
LIBRARY = (
    "diffalign (Frechet distance, CMMD, precision, recall, diversity), torchmetrics (KID's kernel)"
)
NO_FILE = ["none, pixels of uint8 as they are drawn"]
"""The image format of images that were never a file."""


@dataclass(frozen=True)
class Generation:
    """Model, prompts and settings of a generated side."""

    load: Callable[[], TextToImageModel]
    prompts: list[Prompt]
    drawing: Drawing
    about: dict[str, Any]


def generated_side(
    source: Path | Generation, *, batch_size: int, progress: Progress | None = None
) -> Callable[[Network, PartialState], FeatureSet]:
    """Look up a folder's images now, and return the function that computes the features.

    The function reads the folder, or draws with the model. Every process makes or reads a part, in turns of a batch;
    all processes get the whole.
    """
    images = read_folder(source) if isinstance(source, Path) else []

    def compute(network: Network, state: PartialState) -> FeatureSet:
        process = (state.process_index, state.num_processes)
        about: dict[str, Any]
        if isinstance(source, Path):
            about = {"folder": str(source)}
            total = len(images)
            batches = folder_batches(images, about, batch_size=batch_size, process=process)
        else:
            about = {**source.about, "formats": NO_FILE}
            total = len(source.prompts) * source.drawing.images_per_prompt
            batches = model_batches(
                source.load(), source.prompts, about, source.drawing, process=process
            )
        share = math.ceil(total / state.num_processes)
        return extract(network, counted(batches, share, progress), about, gather=gather_object)

    return compute


def counted(batches: Batches, total: int, progress: Progress | None) -> Batches:
    """Yield batches of images, and report how many of `total` are done."""
    done = 0
    if progress is not None:
        progress(0, total)
    for pixels, numbers in batches:
        yield pixels, numbers
        done += len(numbers)
        if progress is not None:
            progress(min(done, total), total)


def reference_side(
    reference: str,
    *,
    batch_size: int,
    max_prompts: int | None = None,
    progress: Progress | None = None,
) -> Callable[[Network], Callable[[], FeatureSet]]:
    """Look up statistics (.npz), a folder, or scenes of Shapes now.

    The returned function checks that a network's features can be compared with them, and returns what computes them.
    """
    path = Path(reference)
    if path.suffix.lower() == ".npz":
        statistics = FeatureSet.load(path)

        def read(network: Network) -> Callable[[], FeatureSet]:
            statistics.check_network(network)
            return lambda: statistics

        return read
    about: dict[str, Any]
    if reference.startswith("shapes:"):
        about = {"drawn": reference, "images_per_prompt": SHAPES_IMAGES, "formats": NO_FILE}
        prompts = load_prompts(reference, limit=max_prompts)
        total = len(prompts) * SHAPES_IMAGES
        source = drawn_batches(
            draw_scene,
            prompts,
            images_per_prompt=SHAPES_IMAGES,
            batch_size=batch_size,
        )
    else:
        about = {"folder": reference}
        images = read_folder(path, setting="reference")
        total = len(images)
        source = folder_batches(images, about, batch_size=batch_size)
    return lambda network: lambda: extract(network, counted(source, total, progress), about)


def draw_scene(prompt: Prompt, seed: int) -> np.ndarray:
    """Draw a correct image (64, 64, 3) uint8 of a Shapes prompt."""
    return render(sample_scene(prompt.metadata, np.random.default_rng(seed)))


def compare_sides(
    generated: FeatureSet, reference: FeatureSet | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the distances that could be computed, and the result with intervals, warnings and provenance."""
    distances: dict[str, Any] = {}
    certainty: dict[str, Any] = {}
    if reference is not None:
        distances, inside = measure(generated, reference)
        certainty = {
            "intervals": distance_intervals(generated, reference, distances, inside),
            "warnings": warnings(generated, reference),
        }
    sides = {"generated": generated} | ({} if reference is None else {"reference": reference})
    result = {
        **distances,
        **certainty,
        "library": LIBRARY,
        "network": generated.network,
        "resize": generated.resize,
        **{name: {"n": side.moments.n, **side.about} for name, side in sides.items()},
        "versions": versions(),
    }
    return {k: v for k, v in distances.items() if v is not None}, result
