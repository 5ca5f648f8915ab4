"""Save and load checkpoints, as safetensors and JSON without pickle.

A checkpoint is written to a hidden folder that is then renamed. Its manifest has the SHA-256 of every file, which
loading verifies.

Every random choice of a run is a function of its seed and of counters, so that a checkpoint needs no generator states.
It has the adapters, the optimizer's moments and the counters.
"""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.core.files import sync
from diffalign.core.fingerprint import of_file

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


class CheckpointError(UserError, RuntimeError):
    """Checkpoint that cannot be read or written. The message names the file."""


def save(
    folder: Path,
    update: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Save a checkpoint, and delete all but the newest `keep`.

    The checkpoint of update 42 is `folder/000042`. All of its files are on the disk before the folder gets this name,
    so that the newest checkpoint is whole after a power cut. A failure leaves older checkpoints untouched.

    Args:
        tensors: named tensors of each file, by the file's stem.
        state: counters of the run, as JSON.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{update:06d}"
    aside = folder / f".writing-{update:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, part in tensors.items():
            save_file(
                {k: v.contiguous().cpu() for k, v in part.items()}, aside / f"{name}.safetensors"
            )
        files = {p.name: of_file(p) for p in sorted(aside.iterdir())}
        manifest = {"update": update, "state": state, "sha256": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in aside.iterdir():
            sync(file)
        _sync_folder(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync_folder(folder)
    # safetensors reports a full disk as an error of its own
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        good = latest(folder)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}); the last good one is {good or 'none'}"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Load and verify a checkpoint.

    Returns:
        The number of the update, the named tensors of each file by its stem, and the counters of the run.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = manifest["sha256"]
        update, state = manifest["update"], manifest["state"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable {MANIFEST}: {error}") from error
    tensors = {}
    for name, digest in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {name}")
        if of_file(file) != digest:
            raise CheckpointError(f"checkpoint file {file} is damaged (cut or changed)")
        tensors[file.stem] = load_file(file)
    return update, tensors, state


def load_newest(folder: Path, *, until: int | None = None) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there is no checkpoint.

    Newer, damaged checkpoints are renamed to `NNNNNN.damaged`, which no run reads, with a warning.

    Args:
        until: ignore checkpoints of later updates.

    Raises:
        CheckpointError: all checkpoints are damaged. None is renamed.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(_all(folder, until=until)):
        try:
            load(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        for other, reason in damaged.items():
            _put_away(other)
            logger.warning("%s; it is now %s.damaged", reason, other.name)
        if damaged:
            logger.warning("going on from the checkpoint before: %s", path)
        return path
    if damaged:
        problems = "; ".join(map(str, damaged.values()))
        raise CheckpointError(
            f"{folder} has no whole checkpoint: {problems}. Put one back, or start again in another output_dir"
        )
    return None


def latest(folder: Path, *, until: int | None = None) -> Path | None:
    """Return the newest checkpoint, of update `until` at most, or None. The checkpoint is not verified."""
    checkpoints = _all(folder, until=until)
    return checkpoints[-1] if checkpoints else None


def drop_after(path: Path) -> None:
    """Delete all checkpoints that are newer than the checkpoint `path`."""
    for other in _all(path.parent):
        if int(other.name) > int(path.name):
            shutil.rmtree(other)


def keep_only(path: Path) -> None:
    """Delete all checkpoints beside the checkpoint `path`."""
    for other in _all(path.parent):
        if other != path:
            shutil.rmtree(other)


def _all(folder: Path, *, until: int | None = None) -> list[Path]:
    """Return the checkpoints, the oldest first. Folders whose names are no numbers are ignored."""
    if not folder.is_dir():
        return []
    numbered = {int(p.name): p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()}
    return [numbered[n] for n in sorted(numbered) if until is None or n <= until]


def _put_away(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _sync_folder(path: Path) -> None:
    # some file systems have no fsync of folders
    with suppress(OSError):
        sync(path)
