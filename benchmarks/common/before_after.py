"""Pictures of the same prompts by several models, for the docs.

Usage: python -m benchmarks.common.before_after base=runs/base moved=runs/moved --output docs/images/dcgen.png

The folders hold images of the same names with captions, as `diffalign evaluate geneval` makes them. Where they are
scored (`results.jsonl`), a green frame marks a correct image and a red frame a wrong one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.images import read_folder, read_image
from diffalign.evaluation.geneval import RESULTS
from diffalign.evaluation.pictures import evenly, labelled_rows
from diffalign.evaluation.preference import by_name, shared_names

FRAME = 2
"""Width of a frame in pixels of the image."""
GREEN, RED = (26, 127, 55), (207, 34, 46)


def verdicts(folder: Path) -> dict[str, bool]:
    """Return whether each scored image of a folder is correct, by its name."""
    file = folder / RESULTS
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    paths = {Path(row["filename"]): bool(row["correct"]) for row in rows}
    return {
        path.relative_to(folder).as_posix(): correct
        for path, correct in paths.items()
        if path.is_relative_to(folder)
    }


def framed(image: Tensor, *, correct: bool | None) -> Tensor:
    """Return an image (3, H, W) uint8 with a frame in the verdict's colour.

    The frame is white without a verdict.
    """
    color = (255, 255, 255) if correct is None else GREEN if correct else RED
    height, width = (n + 2 * FRAME for n in image.shape[1:])
    canvas = torch.tensor(color, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    canvas[:, FRAME:-FRAME, FRAME:-FRAME] = image
    return canvas


def before_after(folders: dict[str, Path], *, columns: int) -> Image.Image:
    """Return a row of images per folder, spread evenly over shared names, with their prompts."""
    sets = {name: by_name(read_folder(folder), folder) for name, folder in folders.items()}
    names = evenly(shared_names(list(sets.values())), columns)
    rows = {}
    for label, images in sets.items():
        correct = verdicts(folders[label])
        frames = [framed(read_image(images[n].path), correct=correct.get(n)) for n in names]
        rows[label] = torch.stack(frames)
    first = next(iter(sets.values()))
    return labelled_rows(rows, [first[name].prompt.text for name in names])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--columns", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help=".png")
    args = parser.parse_args(argv)
    pairs = (text.partition("=")[::2] for text in args.folders)
    folders = {name: Path(folder) for name, folder in pairs}
    before_after(folders, columns=args.columns).save(args.output)


if __name__ == "__main__":
    main()
