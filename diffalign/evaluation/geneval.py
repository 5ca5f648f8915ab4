"""GenEval as its authors run it: a folder a prompt, a JSON line an image, the summary of their script.

Layout: `00000/metadata.jsonl` (one object), `00000/samples/0000.png`, ... Folders made by other tools are read as well.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.core.files import aside, write_json_lines, write_text
from diffalign.core.interruption import Interrupted, Interruption
from diffalign.core.text import read_json_lines
from diffalign.data.images import CaptionedImage, batches
from diffalign.data.pairs.states import states_path
from diffalign.data.prompts import Prompt
from diffalign.evaluation.intervals import mean, task_mean
from diffalign.evaluation.recording import StateKeeper
from diffalign.evaluation.score import Progress, image_seeds
from diffalign.geneval.rules import Detection, judge, summarize
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler, Samples

logger = logging.getLogger(__name__)
Detect = Callable[[Tensor, Sequence[Mapping[str, Any]]], list[list[Detection]]]
"""Function of (B, 3, H, W) uint8 and B prompts' metadata that returns their objects."""
SETTINGS = "settings.json"
RESULTS = "results.jsonl"
PNG_END = b"IEND\xaeB`\x82"
_SAMPLE = re.compile(r"\d+\.png")


class GenEvalError(UserError, ValueError):
    """A folder that is not GenEval's, or holds other prompts."""


def sample_path(folder: Path, prompt: int, image: int) -> Path:
    """Return the path of an image of a prompt."""
    return folder / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note how the images of a folder are made.

    Raises:
        GenEvalError: the folder is being filled in another way.
    """
    file = folder / SETTINGS
    if file.is_file():
        settings_there = read_settings(folder)
        other = [
            f"{k}: {settings_there.get(k)} there"
            for k, v in settings.items()
            if settings_there.get(k) != v
        ]
        if other and not any(folder.glob("*/samples/*.png")):
            for place in folder.iterdir():  # prompts without an image belong to nobody
                if place.is_dir() and place.name.isdecimal():
                    shutil.rmtree(place)
        elif other:
            raise GenEvalError(
                f"{folder} holds images made in another way ({', '.join(other)}): choose another `output_dir`"
            )
    elif sample_path(folder, 0, 0).parents[1].exists():
        raise GenEvalError(
            f"{folder} holds images made by another tool: score them as `images`, or choose another `output_dir`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=1))


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that `claim` noted."""
    try:
        return dict(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise GenEvalError(f"{folder / SETTINGS} is damaged: {error}") from error


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write the metadata of every prompt.

    Raises:
        GenEvalError: the folder has another prompt at a place.
    """
    for i, prompt in enumerate(prompts):
        file = sample_path(folder, i, 0).parents[1] / "metadata.jsonl"
        if file.is_file():
            metadata = _metadata(file)
            if metadata != prompt.metadata:
                raise GenEvalError(
                    f"{file} is of another prompt ({metadata.get('prompt')!r}, not {prompt.text!r}): "
                    "choose another folder"
                )
        file.parent.joinpath("samples").mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(prompt.metadata))
    extra = folder / f"{len(prompts):05d}"
    if extra.exists():
        raise GenEvalError(f"{extra} is beyond the {len(prompts)} prompts: choose another folder")


def generate_samples(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    folder: Path,
    drawing: Drawing,
    *,
    process: tuple[int, int] = (0, 1),
    keeper: StateKeeper | None = None,
    progress: Progress | None = None,
) -> int:
    """Draw the missing ones of `images_per_prompt` images per prompt, and return how many were missing.

    An image whose file is empty or cut off is missing, too. An image that is not finite is not written, and so counts
    as missing. A `keeper` writes states of each image, without which the image is missing.

    `process`: number and count of those that share the work. The images are those of `evaluate_model` with the same
    settings, whoever makes them and in however many goes, but for what a batch's size does to rounding.
    """
    n = drawing.images_per_prompt
    seeds = image_seeds(drawing, len(prompts) * n)
    samples = [(p, k) for p in range(process[0], len(prompts), process[1]) for k in range(n)]
    missing = [
        (p, k)
        for p, k in samples
        if not is_whole(sample_path(folder, p, k), with_states=keeper is not None)
    ]
    sampler = Sampler(model, drawing)
    with Interruption("the images in hand are finished and kept") as interruption:
        for rows in drawing.batches(len(missing)):
            part = missing[rows]
            batch = sampler.images(
                [prompts[p].text for p, _ in part],
                [seeds[p * n + k] for p, k in part],
                step=keeper.recorder.around(sampler.step()) if keeper else None,
            )
            _write_samples(folder, part, batch, keeper)
            if progress is not None:
                progress(rows.stop, len(missing))
            if interruption.number:
                left = len(missing) - rows.stop
                raise Interrupted(
                    interruption.number,
                    f"{len(samples) - left} of {len(samples)} images are in {folder}; the same command "
                    "draws the others",
                )
    return len(missing)


def _write_samples(
    folder: Path, places: Sequence[tuple[int, int]], batch: Samples, keeper: StateKeeper | None
) -> None:
    """Write the finite images of one batch, each after its states."""
    recording = keeper.recorder.take() if keeper else None
    for row, ((p, k), good) in enumerate(zip(places, batch.finite.tolist(), strict=True)):
        place = sample_path(folder, p, k)
        if not good:
            logger.warning("%s: the model made no finite image", place)
            continue
        # first: an image that is there has its states
        if keeper and recording:
            keeper.write(place, recording, row, prompt=p)
        picture = Image.fromarray(batch.images[row].permute(1, 2, 0).numpy())
        with aside(place) as file:
            picture.save(file, format="PNG")


def is_whole(image: Path, *, with_states: bool = False) -> bool:
    """Return True for a sample that can be read, with its recorded states."""
    try:
        content = image.read_bytes()
        if not content.endswith(PNG_END):
            return False
        with Image.open(io.BytesIO(content)) as picture:
            # checks every chunk's sum without decoding
            picture.verify()
        if with_states:
            with safe_open(states_path(image), "pt"):
                pass
    # Pillow's parsers raise whatever a damaged file leads them to
    except Exception:
        return False
    return True


def read_samples(folder: Path) -> tuple[list[CaptionedImage], int]:
    """All images of a GenEval folder, prompt by prompt, and how many prompts have none.

    Raises:
        GenEvalError: it is none, or a prompt's metadata cannot be read.
    """
    if not folder.is_dir():
        raise GenEvalError(f"{folder} is no folder")
    images_of_all: list[CaptionedImage] = []
    empty = 0
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()):
        metadata = _metadata(place / "metadata.jsonl")
        prompt = Prompt(str(metadata.get("prompt", "")), metadata)
        samples = place / "samples"
        files = sorted(samples.iterdir()) if samples.is_dir() else []
        images = [CaptionedImage(f, prompt) for f in files if _SAMPLE.fullmatch(f.name)]
        empty += not images
        images_of_all += images
    if not images_of_all:
        raise GenEvalError(
            f"no image in {folder}; GenEval's layout is 00000/metadata.jsonl and 00000/samples/0000.png"
        )
    return images_of_all, empty


def score_samples(
    images: Sequence[CaptionedImage],
    detect: Detect,
    *,
    batch_size: int,
    compat: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Return one row per image, with GenEval's fields and the continuous `score`.

    The fields `metadata` and `details` are JSON texts. An image that cannot be read has `error`, and is not correct.
    """
    rows: list[dict[str, Any]] = [{} for _ in images]
    done = 0
    for numbers, pixels, error in batches(images, size=batch_size):
        entries = [images[i].prompt.metadata for i in numbers]
        objects_of = [[] for _ in numbers] if pixels is None else detect(pixels, entries)
        for i, objects in zip(numbers, objects_of, strict=True):
            rows[i] = _row(images[i], objects, compat=compat)
            if error is not None:
                rows[i] |= {"correct": False, "reason": "unreadable", "error": error}
        done += len(numbers)
        if progress is not None:
            progress(done, len(images))
    return rows


def _row(image: CaptionedImage, objects: Sequence[Detection], *, compat: bool) -> dict[str, Any]:
    metadata = image.prompt.metadata
    verdict = judge(objects, metadata, compat=compat)
    details: dict[str, list[list[float]]] = {}
    for o in objects:
        details.setdefault(o.name, []).append([*o.box, o.score])
    return {
        "filename": str(image.path),
        "tag": image.prompt.task,
        "prompt": image.prompt.text,
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "strict": verdict.strict,
        "score": verdict.score,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }


def summary(rows: Sequence[Mapping[str, Any]], *, empty: int = 0) -> dict[str, Any]:
    """Return the figures of GenEval's summary, with 95 % intervals.

    The figures are the shares of correct images and of prompts with a correct one, the accuracy of each task, and
    their mean, `overall`. `missing` counts the images that prompts have fewer than the prompt with the most, the
    `empty` prompts that have none included; an image that cannot be read counts as wrong.
    """
    places = [str(Path(row["filename"]).parents[1]) for row in rows]
    by_prompt: dict[str, list[bool]] = {}
    for place, row in zip(places, rows, strict=True):
        by_prompt.setdefault(place, []).append(row["correct"])
    most = max(map(len, by_prompt.values()))
    unreadable = sum("error" in row for row in rows)
    columns = {
        "correct_images": np.array([row["correct"] for row in rows], np.float64),
        "strict_images": np.array([row["strict"] for row in rows], np.float64),
        "score": np.array([row["score"] for row in rows], np.float64),
    }
    tasks = [row["tag"] for row in rows]
    estimates = {
        **task_mean(columns["correct_images"], places, tasks),
        **{name: mean(values, places) for name, values in columns.items()},
        "correct_prompts": mean(
            np.array([any(c) for c in by_prompt.values()], np.float64), list(by_prompt)
        ),
    }
    return {
        "images": len(rows),
        "scored": len(rows) - unreadable,
        "unreadable": unreadable,
        "missing": sum(most - len(verdicts) for verdicts in by_prompt.values()) + empty * most,
        "prompts_without_image": empty,
        "prompts_scored": len(by_prompt),
        "correct_images": sum(row["correct"] for row in rows) / len(rows),
        "correct_prompts": sum(map(any, by_prompt.values())) / len(by_prompt),
        "strict_images": sum(row["strict"] for row in rows) / len(rows),
        "score": sum(row["score"] for row in rows) / len(rows),
        "tasks": summarize(tasks, [r["correct"] for r in rows]),
        "intervals": {name: e.to_dict() for name, e in estimates.items() if e is not None},
    }


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """GenEval's results file."""
    write_json_lines(file, rows)


def _metadata(file: Path) -> dict[str, Any]:
    entries = read_json_lines(file, error=GenEvalError)
    if len(entries) != 1 or not isinstance(entries[0], dict):
        raise GenEvalError(f"{file} must hold one JSON object")
    return entries[0]
