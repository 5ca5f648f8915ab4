"""Checkpoints: written aside, verified, renamed; safetensors and JSON, never pickle.

Every random choice of a run is a function of its seed and of counters, so a checkpoint needs no generator states: the
adapters, the optimizer's moments and the number of the update are all there is.
"""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.core.files import sync
from diffalign.core.fingerprint import of_file

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read; the message says which file and what to do."""


def save(
    folder: Path,
    update: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write `folder/000042`; afterwards only the newest `keep` remain. A failure leaves older ones untouched.

    All of it is on the disk before the folder gets its name, so that a power cut leaves the newest one whole.
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
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        shutil.rmtree(aside, ignore_errors=True)
        good = latest(folder)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}); the last good one is {good or 'none'}"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(update, tensors by file, state); CheckpointError for anything missing, cut or changed."""
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
    """Return the newest whole checkpoint (of update `until` at most), or None where there is no checkpoint.

    Damaged ones that are newer are renamed to `NNNNNN.damaged`, which no run reads, with a warning.

    Raises:
        CheckpointError: all are damaged; none is renamed.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(_all(folder, until=until)):
        try:
            load(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        for other, error in damaged.items():
            _put_away(other)
            logger.warning("%s; it is now %s.damaged", error, other.name)
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
    """The newest finished checkpoint (of update `until` at most), or None."""
    found = _all(folder, until=until)
    return found[-1] if found else None


def drop_after(path: Path) -> None:
    """Remove checkpoints that are newer than this one."""
    for other in _all(path.parent):
        if int(other.name) > int(path.name):
            shutil.rmtree(other)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors, "index.name"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": torch.as_tensor(v).clone()
        for i, part in state.items()
        for name, v in part.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _all(folder: Path, *, until: int | None = None) -> list[Path]:
    """Return the checkpoints by number, the oldest first; folders with other names are somebody's own."""
    if not folder.is_dir():
        return []
    numbered = {int(p.name): p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()}
    return [numbered[n] for n in sorted(numbered) if until is None or n <= until]


def _put_away(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems have no fsync of folders
        sync(path)
