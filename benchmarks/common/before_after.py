"""Pictures of the same prompts by several models, for the docs.

Usage: python -m benchmarks.common.before_after base=runs/base moved=runs/moved --output docs/images/dcgen.png

The folders hold images of the same names with captions, as `diffalign evaluate geneval` makes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from diffalign.data.images import read_folder, read_image
from diffalign.evaluation.pictures import evenly, labelled_rows
from diffalign.evaluation.preference import by_name, shared_names


def before_after(folders: dict[str, Path], *, columns: int) -> Image.Image:
    """Return a row of images per folder, spread evenly over shared names, with their prompts."""
    sets = {name: by_name(read_folder(folder), folder) for name, folder in folders.items()}
    names = evenly(shared_names(list(sets.values())), columns)
    rows = {
        label: torch.stack([read_image(images[name].path) for name in names])
        for label, images in sets.items()
    }
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
