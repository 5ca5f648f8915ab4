"""Types of flags: functions that convert and check a text before anything is loaded.

They raise UsageError without the flag's name, which the parser puts in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from diffalign.core import files
from diffalign.core.errors import UsageError, UserError
from diffalign.core.files import check_target

SEEDS = 2**63
"""Upper bound (exclusive) of seeds, which are stored as signed 64-bit integers."""
RUNS = "runs"
"""Default folder of results, therefore never read as the owner of a hub id."""


def count(low: int = 1, high: int | None = None) -> Callable[[str], int]:
    """Return the type of a whole number from `low` to `high`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UsageError(f"must be a whole number, got {text!r}") from None
        _check_range(value, text, low=low, high=high)
        return value

    return convert


def number(
    low: float | None = None, *, high: float | None = None, above: float | None = None
) -> Callable[[str], float]:
    """Return the type of a finite number from `low` to `high` and greater than `above`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise UsageError(f"must be a number, got {text!r}") from None
        if low is not None and not value >= low:
            raise UsageError(f"must be at least {low:g}, got {text}")
        if not math.isfinite(value):
            raise UsageError(f"must be finite, got {text}")
        if above is not None and value <= above:
            raise UsageError(f"must be greater than {above:g}, got {text}")
        _check_range(value, text, low=low, high=high)
        return value

    return convert


def _check_range(value: float, text: str, *, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise UsageError(f"must be at least {low:g}, got {text}")
    if high is not None and value > high:
        raise UsageError(f"must be at most {high}, got {text}")


def seed(text: str) -> int:
    """Convert a seed, a whole number from 0 to 2**63 - 1."""
    return count(0, SEEDS - 1)(text)


def sizes(text: str) -> list[tuple[int, int]]:
    """Convert sizes such as "1024x1024,768x512", width first, to (height, width)."""
    pairs = []
    for part in text.split(","):
        width, cross, height = part.strip().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and int(width) * int(height)):
            raise UsageError(f"must be WIDTHxHEIGHT, such as 1024x1024, got {part!r}")
        pairs.append((int(height), int(width)))
    return pairs


def path(text: str) -> Path:
    """Convert a path, and expand `~`, which the shell may have left alone."""
    if not text:
        raise UsageError("must not be empty")
    return files.expand_home(text)


def place(text: str) -> str:
    """Convert a name, a path or a hub id; expand `~` in a path."""
    return str(files.expand_home(text)) if text.startswith("~") else text


def expand_home(setting: str) -> str:
    """Expand `~/` in `--key=~/path`, where shells leave it alone."""
    key, equals, value = setting.partition("=")
    if equals and value.startswith("~"):
        return f"{key}={files.expand_home(value)}"
    return str(files.expand_home(setting)) if setting.startswith("~") else setting


def input_folder(text: str) -> Path:
    """Convert the path of a folder that exists."""
    folder = path(text)
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {kind}; name a folder that exists")
    return folder


def output_folder(text: str) -> Path:
    """Convert the path of a folder to write into; it need not exist."""
    folder = path(text)
    _check_writable(folder)
    return folder


def new_folder(text: str) -> Path:
    """Convert the path of a folder that must not exist yet."""
    folder = path(text)
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already; name a new folder, or remove it first")
    _check_writable(folder)
    return folder


def output_file(text: str) -> Path:
    """Convert the path of a file to write."""
    file = path(text)
    _check_writable(file, folder=False)
    return file


def _check_writable(place: Path, *, folder: bool = True) -> None:
    """Raise UsageError if a folder or a file cannot be created or written."""
    try:
        check_target(place, folder=folder)
    except UsageError as error:
        raise UsageError(error.message) from error


def model(text: str) -> str:
    """Convert a model: a name, a folder or a hub id."""
    from diffalign.pipelines.registry import resolve

    name = place(text)
    check_hub_id(name.partition("@")[0], "a folder")
    try:
        resolve(name)
    except UserError as error:
        raise UsageError(error.message) from error
    return name


def lora(text: str) -> str:
    """Convert a LoRA: a folder, a file, or a hub id with an optional `:FILE`."""
    name = place(text)
    repository = name.rpartition(":")[0] or name
    if any(Path(p).exists() for p in (name, repository)):
        return name
    if "/" not in repository:
        raise UsageError(
            f"{name} does not exist; name a folder, a .safetensors file or a hub id (owner/name)"
        )
    check_hub_id(repository, "a folder, a .safetensors file")
    return name


def refused(reason: str) -> Callable[[str], str]:
    """Return the type of a flag that a verb refuses for this reason."""

    def refuse(text: str) -> str:
        raise UsageError(reason)

    return refuse


def check_hub_id(name: str, local: str) -> None:
    """Raise UsageError for a missing path that cannot be a hub id.

    Names without a slash pass.
    """
    owner, slash, rest = name.partition("/")
    if not slash or Path(name).exists():
        return
    # if the first part is an existing folder, the rest of the path is mistyped
    if owner in ("", ".", "..", RUNS) or "/" in rest or not rest or Path(owner).is_dir():
        raise UsageError(f"{name} does not exist; name {local} or a hub id (owner/name)")


def names(text: str) -> list[str]:
    """Convert comma-separated names; at least one is needed."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("names none; give one or more, separated by commas")
    return names


def named_folder(text: str) -> tuple[str, Path]:
    """Convert `NAME=DIR`, or `DIR` with its own name, where the folder must exist."""
    name, _, place = ("", "", text) if files.expand_home(text).is_dir() else text.rpartition("=")
    folder = input_folder(place)
    return name or folder.name, folder


def is_image_folder(text: str) -> bool:
    """Return True for the path of a folder that is not a model."""
    folder = path(text)
    return folder.is_dir() and not (folder / "model_index.json").is_file()


def generated(text: str) -> str:
    """Convert a folder of images, or a model."""
    if is_image_folder(text):
        return str(path(text))
    try:
        return model(text)
    except UsageError as error:
        raise UsageError(f"{text} is no folder of images, and {error}") from error


def reference(text: str) -> str:
    """Convert a reference: a folder of images, a .npz file, or a prompt set of Shapes."""
    if text.startswith("shapes:"):
        return text
    file = path(text)
    if file.suffix.lower() == ".npz":
        if not file.is_file():
            raise UsageError(f"{file} does not exist; save one with `save_statistics`")
        return str(file)
    return str(input_folder(text))


def backend(text: str) -> str:
    """Convert the name of a quantisation backend, or auto."""
    from diffalign.quantization.backends import check_name

    check_name(text)
    return text
