"""Listing of folders with images, captions and tables; files that are left out are logged."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffalign.core.errors import UserError
from diffalign.core.text import suffix_of

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif"),
        *(".tif", ".tiff", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
    )
)
"""Suffixes of image files that Pillow reads without a plugin."""
OTHER_MEDIA = frozenset(
    (
        *(".heic", ".heif", ".jxl", ".psd", ".svg", ".pdf", ".eps", ".raw", ".dng", ".cr2", ".nef"),
        *(".arw", ".exr", ".hdr", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".zip", ".npy"),
    )
)
"""Suffixes of media files that are not read, although a user may expect it."""
SYSTEM_FOLDERS = (
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "recycler", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "found.000"),
)
SYSTEM_NAME = re.compile("|".join((*map(re.escape, SYSTEM_FOLDERS), r"paxheaders(\.\d+)?")))
"""Names in lower case that operating systems and archivers write."""
QUIET = frozenset((".ds_store", ".git", ".gitattributes", ".gitignore", ".cache"))
"""Hidden names that are left out without a message."""
DESCRIPTIONS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json"))
"""Names of JSON files that describe a dataset and hold no rows."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words that name each split of a dataset, as in the library `datasets`."""
_WORDS = {word: split for split, words in SPLITS.items() for word in words}
_reported: set[tuple[str, str]] = set()


class FolderError(UserError, ValueError):
    """Folder that cannot be read; the message names it."""


@dataclass
class Folder:
    """Files below `root`, sorted by path, and the names of files left out, by reason."""

    root: Path
    files: list[Path]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    gone: set[Path] = field(default_factory=set)
    """Files that were removed from the list; hidden ones never were in it."""

    def leave_out(self, paths: Iterable[Path], why: str) -> None:
        """Remove files from the list, with a reason for `report`."""
        gone = set(paths)
        if gone:
            self.gone |= gone
            self.files = [p for p in self.files if p not in gone]
            names = sorted(p.relative_to(self.root).as_posix() for p in gone)
            self.left_out.setdefault(why, []).extend(names)

    def of_type(self, suffixes: Iterable[str]) -> list[Path]:
        """Return the files with one of these suffixes (lower case)."""
        every = set(suffixes)
        return [p for p in self.files if suffix_of(p) in every]

    @property
    def images(self) -> list[Path]:
        """Files with the suffix of an image."""
        return self.of_type(IMAGE_SUFFIXES)

    def without_image(self) -> str:
        """Return the message about a folder without images: its content and valid suffixes."""
        every = [suffix_of(p) or "no suffix" for p in self.files]
        content = ", ".join(f"{every.count(s)} of {s}" for s in sorted(set(every))) or "no file"
        without = f"; left out {self}" if self.left_out else ""
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        return f"no image in {self.root}, which holds {content}{without}; expected {suffixes}"

    def __str__(self) -> str:
        return "; ".join(
            f"{len(names)} {why} ({', '.join(names[:2])}{', ...' if names[2:] else ''})"
            for why, names in self.left_out.items()
        )

    def report(self) -> None:
        """Log the files that were left out, once per folder."""
        if self.left_out:
            say_once(self.root, f"left out {self}")


def say_once(place: Path, text: str) -> None:
    """Log a message about a file or folder once, however often it is read."""
    key = (str(place.resolve()), text)
    if key not in _reported:
        _reported.add(key)
        logger.warning("%s: %s", place, text)


def walk(root: Path, *, error: type[UserError] = FolderError) -> Folder:
    """List every file below a folder, without hidden files and those of operating systems.

    Links are followed.

    Raises:
        error: the folder does not exist, or cannot be listed.
    """
    if not root.is_dir():
        raise error(f"{root} is no folder. Name one that exists")
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}

    def refuse(cause: OSError) -> None:
        raise error(
            f"{cause.filename} cannot be listed: {cause.strerror}. Check its permissions"
        ) from cause

    visited: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        facts = os.stat(place)
        # a link may lead to a folder above it
        if (facts.st_dev, facts.st_ino) in visited:
            folders.clear()
            continue
        visited.add((facts.st_dev, facts.st_ino))
        hidden = [n for n in (*folders, *names) if is_hidden(n)]
        for name in hidden:
            if name.lower() not in QUIET:
                path = Path(place, name).relative_to(root).as_posix()
                left_out.setdefault("hidden or of the system", []).append(path)
        folders[:] = [n for n in folders if not is_hidden(n)]
        files += [Path(place, n) for n in names if not is_hidden(n)]
    return Folder(root, sorted(files), left_out)


def is_hidden(name: str) -> bool:
    """Return True for names of hidden files, and of files of operating systems and programs."""
    return name.startswith((".", "~")) or SYSTEM_NAME.fullmatch(name.lower()) is not None


def walk_images(root: Path, *, error: type[UserError] = FolderError) -> Folder:
    """List a folder of images; of a dataset with splits only the training split.

    Raises:
        error: the folder does not exist, or cannot be listed.
    """
    folder = walk(root, error=error)
    folder.leave_out(folder.of_type(OTHER_MEDIA), "of a kind that is not read")
    _keep_training_folder(folder)
    folder.leave_out(_grids(folder.images), "made of the other images")
    return folder


def _keep_training_folder(folder: Folder) -> None:
    """Leave out folders of other splits that lie beside a folder of the training split."""
    beside: dict[tuple[Path, str], dict[str, set[Path]]] = {}
    for place in {p.parent.relative_to(folder.root) for p in folder.images}:
        # the last one is the folder itself, whose name says nothing about its images
        for path in (place, *place.parents)[:-1]:
            split, rest = _split_of_folder(path.name)
            if split is not None:
                splits = beside.setdefault((path.parent, rest), {})
                splits.setdefault(split, set()).add(folder.root / path)
    other = {
        path
        for splits in beside.values()
        if "train" in splits
        for split, paths in splits.items()
        if split != "train"
        for path in paths
    }
    folder.leave_out(
        [p for p in folder.files if not other.isdisjoint(p.parents)],
        "of other splits than train; name a split's own folder to read it",
    )


def _split_of_folder(name: str) -> tuple[str | None, str]:
    """Split a folder's name, such as val2017, into its split and the rest."""
    words = [re.sub(r"(images|imgs|set|data)$", "", word) for word in _words(name)]
    place = next((i for i, word in enumerate(words) if word in _WORDS), None)
    if place is None:
        return None, ""
    rest = [*words[:place], "*", *words[place + 1 :]]
    return _WORDS[words[place]], " ".join(filter(None, rest))


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case, also those of camel case."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _grids(images: Sequence[Path]) -> list[Path]:
    """Return the overview images that `diffalign generate` writes beside numbered images."""
    numbered = {p.parent for p in images if re.match(r"\d{4}[-.]", p.name)}
    return [p for p in images if p.name == "grid.png" and p.parent in numbered]


def split_of(path: Path) -> str | None:
    """Return the split that a word of a path names, such as data/train-00000.parquet."""
    for word in _words(path.as_posix()):
        if word in _WORDS:
            return _WORDS[word]
    return None


def keep_training_files(folder: Folder, files: Sequence[Path]) -> list[Path]:
    """Return all files; with a training split leave out the other splits."""
    describing = [p for p in files if p.name.lower() in DESCRIPTIONS]
    if len(describing) < len(files):
        folder.leave_out(describing, "describing a dataset")
        files = [p for p in files if p not in describing]
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.relative_to(folder.root)), []).append(file)
    splits = by_split.keys() - {None}
    if "train" not in splits or len(splits) == 1:
        if len(splits) > 1:
            names = ", ".join(files[0].name for files in by_split.values())
            text = f"files of several splits are read together ({names}, ...); name one to read it alone"
            say_once(folder.root, text)
        return list(files)
    other = [p for split in splits - {"train"} for p in by_split[split]]
    folder.leave_out(other, "of other splits than train; name a file to read it alone")
    return [p for p in files if split_of(p.relative_to(folder.root)) in ("train", None)]
