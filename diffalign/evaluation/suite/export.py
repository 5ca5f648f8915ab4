"""Layouts that the official scripts read, so that anybody can check a figure with them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from diffalign.core.files import aside, write_text
from diffalign.data.prompts import Prompt
from diffalign.evaluation.geneval import sample_path
from diffalign.evaluation.suite.base import Benchmark, SuiteError

Writer = Callable[[Path, Prompt, int, list[Path]], None]
"""Function of folder, prompt, its number and its images."""


def export(benchmark: Benchmark, prompts: Sequence[Prompt], images: Path, folder: Path) -> int:
    """Write a benchmark's images in its official layout; return the number of files.

    Args:
        images: folder in GenEval's layout.
        folder: folder to write into; the benchmark has a folder below it.

    Raises:
        SuiteError: the benchmark has no official layout, or an image is missing.
    """
    if benchmark.layout not in LAYOUTS:
        raise SuiteError(
            f"export={folder}: {benchmark.name} has no official layout; those with one are {', '.join(LAYOUTS)}"
        )
    place = folder / benchmark.folder
    place.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        samples = sample_path(images, number, 0).parent
        files = sorted(samples.glob("[0-9]*.png"))
        if not files:
            raise SuiteError(f"export={folder}: {samples} has no image. Draw all images first")
        LAYOUTS[benchmark.layout](place, prompt, number, files)
    if benchmark.layout == "geneval2":
        paths = {p.text: f"{n:05d}.png" for n, p in enumerate(prompts)}
        write_text(place / "image_paths.json", json.dumps(paths, indent=1))
    return sum(1 for file in place.rglob("*") if file.is_file())


def _grid(files: Sequence[Path], target: Path, kind: str) -> None:
    """Write images as one square grid, row by row, each in its own pixels."""
    pictures = []
    for file in files:
        with Image.open(file) as opened:
            pictures.append(opened.convert("RGB"))
    side = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    canvas = Image.new("RGB", (side * width, side * height))
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i % side * width, i // side * height))
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": True} if kind == "webp" else {}
    with aside(target) as hidden:
        canvas.save(hidden, format=kind.upper(), **options)


def _copies(names: Sequence[str], files: Sequence[Path], folder: Path) -> None:
    for name, file in zip(names, files, strict=True):
        with aside(folder / name) as hidden:
            shutil.copyfile(file, hidden)


def _geneval2(folder: Path, prompt: Prompt, number: int, files: list[Path]) -> None:
    _copies([f"{number:05d}.png"], files[:1], folder)


def _numbered(folder: Path, prompt: Prompt, number: int, files: list[Path]) -> None:
    index = prompt.metadata.get("index", number)
    _copies([f"{index}_{k}.png" for k in range(len(files))], files, folder)


def _longtext(folder: Path, prompt: Prompt, number: int, files: list[Path]) -> None:
    # ids have gaps: files go by id, not by line
    index = int(prompt.metadata.get("prompt_id", number))
    _copies([f"{index:04d}_{k}.png" for k in range(len(files))], files, folder)


def _wise(folder: Path, prompt: Prompt, number: int, files: list[Path]) -> None:
    _copies([f"{prompt.metadata['prompt_id']}.png"], files[:1], folder)


def _dpg(folder: Path, prompt: Prompt, number: int, files: list[Path]) -> None:
    _grid(files, folder / f"{prompt.metadata['item_id']}.png", "png")


def _oneig(folder: Path, prompt: Prompt, number: int, files: list[Path]) -> None:
    _grid(files, folder / prompt.metadata["set"] / f"{prompt.metadata['id']}.webp", "webp")


def _compbench(folder: Path, prompt: Prompt, number: int, files: list[Path]) -> None:
    if "/" in prompt.text or "_" in prompt.text:
        raise SuiteError(
            f"the prompt {prompt.text!r} cannot be a file name that T2I-CompBench's scripts read"
        )
    start = number * len(files)
    place = folder / prompt.metadata["set"] / "samples"
    place.mkdir(parents=True, exist_ok=True)
    names = [f"{prompt.text}_{start + k:06d}.png" for k in range(len(files))]
    _copies(names, files, place)


LAYOUTS: dict[str, Writer] = {
    "geneval2": _geneval2,
    "unigenbench": _numbered,
    "longtext": _longtext,
    "wise": _wise,
    "dpg": _dpg,
    "oneig": _oneig,
    "compbench": _compbench,
}
"""Writer of each layout."""
