"""`diffalign evaluate fid`: how far a set of images lies from a reference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from diffalign.commands.images import batching, drawing, evaluation, load
from diffalign.commands.output import print_scores, write_result
from diffalign.core import processes
from diffalign.core.errors import UsageError
from diffalign.core.versions import versions
from diffalign.data.images import read_folder
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.fid import (
    FeatureSet,
    compare,
    drawn_batches,
    extract,
    folder_batches,
    model_batches,
)
from diffalign.rewards.features import FeatureNetwork, load_network
from diffalign.shapes.world import render, sample_scene

SHAPES_IMAGES = 8
"""Drawn scenes a prompt, where Shapes is the reference."""
LIBRARY = (
    "diffalign (Frechet distance, CMMD, precision, recall, diversity), torchmetrics (KID's kernel)"
)
NO_FILE = ["none, pixels of uint8 as they are drawn"]
"""The image format of what never was a file."""


def evaluate_fid(args: argparse.Namespace) -> int:
    """FID, KID, CMMD, precision and recall of what is --generated (--images, --model) against --reference, or its
    statistics alone; the last line is JSON."""
    _read_generated(args)
    if args.reference is None and args.save_statistics is None:
        raise UsageError(
            "evaluate fid needs --reference (a folder, statistics (.npz) or shapes:held_out) or --save_statistics"
        )
    on_shapes = (args.reference or "").startswith("shapes:") or (
        args.images is None and args.model.startswith("shapes-")
    )
    state = processes.current()  # first: it says which GPU is this process's
    network = load_network(args.network or ("shapes_clip" if on_shapes else "inception"))
    # whether it is there is to be known now
    reference_of = None if args.reference is None else _reference(args, network)
    generated = _generated(args, network, state)
    if state.is_main_process:
        if args.save_statistics is not None:
            generated.save(args.save_statistics)
        result = _compared(args, generated, None if reference_of is None else reference_of())
        write_result(args.output, result)
        print(json.dumps(result))
    return 0


def _read_generated(args: argparse.Namespace) -> None:
    """--generated is --images for a folder of images, and --model for all else."""
    if args.generated is None:
        return
    if args.images is not None:
        raise UsageError("--generated: give either it or --images")
    folder = Path(args.generated)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        args.images = folder
    else:
        args.model = args.generated


def _compared(
    args: argparse.Namespace, generated: FeatureSet, reference: FeatureSet | None
) -> dict[str, Any]:
    """The result, with a table for people where there is something to compare with."""
    found = {} if reference is None else compare(generated, reference)
    sides = {"generated": generated} | ({} if reference is None else {"reference": reference})
    if reference is not None:
        print_scores(
            f"{generated.moments.n} images against {reference.moments.n} of {args.reference}, {generated.network}",
            {k: v for k, v in found.items() if v is not None},
        )
    return {
        **found,
        "library": LIBRARY,
        "network": generated.network,
        "resize": generated.resize,
        **{name: {"n": side.moments.n, **side.about} for name, side in sides.items()},
        "versions": versions(),
    }


def _generated(
    args: argparse.Namespace, network: FeatureNetwork, state: PartialState
) -> FeatureSet:
    """Every process makes or reads a part, in turns of a batch; all of them get the whole."""
    about: dict[str, Any]
    process = (state.process_index, state.num_processes)
    if args.images is not None:
        about = {"folder": str(args.images)}
        images = read_folder(args.images)
        source = folder_batches(images, about, batch_size=args.batch_size, process=process)
    else:
        if args.images_per_prompt is None:
            args.images_per_prompt = 4
        args.prompts = args.prompts or "shapes:held_out"
        prompts = load_prompts(args.prompts, limit=args.max_prompts)
        about = {
            **drawing(args),
            "images_per_prompt": args.images_per_prompt,
            "dtype": args.dtype,
            "formats": NO_FILE,
        }
        config = evaluation(args)
        source = model_batches(
            load(args), prompts, about, config, process=process, **batching(args)
        )
    return extract(network, source, about, gather=gather_object)


def _reference(args: argparse.Namespace, network: FeatureNetwork) -> Callable[[], FeatureSet]:
    """Statistics, a folder, or scenes of Shapes: looked for now, computed when it is called."""
    path = Path(args.reference)
    if path.suffix == ".npz":
        found = FeatureSet.load(path)
        return lambda: found
    about: dict[str, Any]
    if args.reference.startswith("shapes:"):
        about = {
            "drawn": args.reference,
            "images_per_prompt": SHAPES_IMAGES,
            "formats": NO_FILE,
        }
        prompts = load_prompts(args.reference, limit=args.max_prompts)
        source = drawn_batches(
            draw_scene, prompts, images_per_prompt=SHAPES_IMAGES, batch_size=args.batch_size
        )
    else:
        about = {"folder": args.reference}
        images = read_folder(path, flag="--reference")
        source = folder_batches(images, about, batch_size=args.batch_size)
    return lambda: extract(network, source, about)


def draw_scene(prompt: Prompt, seed: int) -> np.ndarray:
    """A right image of a Shapes prompt."""
    return render(sample_scene(prompt.metadata, np.random.default_rng(seed)))
