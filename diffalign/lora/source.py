"""Find a LoRA by what a user calls it: a file, a folder, or a hub id. A path that exists is never a hub id."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.core.errors import UsageError, one_line
from diffalign.core.files import expand_home
from diffalign.core.hub import explain
from diffalign.core.text import read_json

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
SUFFIX = ".safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LONGEST = 300


@dataclass(frozen=True)
class Source:
    """A LoRA file on this machine, and PEFT's `adapter_config.json` of it.

    `unclear`: the error for a file without alpha beside a configuration that may be another file's.
    """

    file: Path
    config: dict[str, Any] | None
    unclear: str = ""


def locate(source: str) -> Source:
    """Return the file that `source` means; from the hub it is downloaded.

    Args:
        source: a file, a folder, or a hub id; behind a colon the file in it, "wangfuyun/PCM_Weights:sd15/FILE".

    Raises:
        UsageError: nothing is there, several files are, or the hub does not give it.
    """
    path = expand_home(source)
    if path.exists():
        return _local(path, source)
    place, colon, name = source.rpartition(":")
    if not colon:
        place, name = source, ""
    folder = expand_home(place)
    if colon and folder.is_dir():
        if not (folder / name).exists():
            raise UsageError(f"lora: {folder} has no {name}. Check the name behind the colon.")
        return _local(folder / name, source)
    if not _HUB_ID.fullmatch(place):
        raise UsageError(f"lora: {source} does not exist. Check the path.")
    if Path(place).parts[0] != place and Path(Path(place).parts[0]).is_dir():
        raise UsageError(
            f"lora: {source} does not exist, though the folder {Path(place).parts[0]} does. Check the path."
        )
    return _remote(place, name)


def _local(path: Path, source: str) -> Source:
    if path.is_dir():
        below = partial(_below, path)
        path = path / _choose(_files(path), where=str(path), source=source, find_below=below)
    if path.suffix.lower() != SUFFIX:
        raise UsageError(
            f"lora: {path} is no {SUFFIX} file, and pickles (.bin, .pt, .ckpt) can run code. Convert it to safetensors "
            "with the program that made it."
        )
    place = path.with_name(CONFIG_NAME)
    # diffusers has its configuration in the header
    if not place.is_file() or path.name == WEIGHT_NAME:
        return Source(path, None)
    files = [n for n in _files(path.parent) if n.lower().endswith(SUFFIX)]
    if path.name == PEFT_NAME or len(files) == 1:
        return Source(path, _read_config(place))
    owner = f"name {path.with_name(PEFT_NAME)}, or " if PEFT_NAME in files else ""
    return Source(
        path,
        None,
        f"lora: {path} has no alpha, and {CONFIG_NAME} beside it may be that of another of the {len(files)} files: "
        f"{owner}put {path.name} into a folder of its own, with its {CONFIG_NAME}.",
    )


def _files(folder: Path) -> list[str]:
    """Return the names of a folder's files, hidden ones left out."""
    return [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]


def _below(folder: Path) -> list[str]:
    """Return the LoRAs up to two folders below. PEFT's and diffusers' names of files count."""
    paths = [
        p
        for deep in ("*", "*/*")
        for n in (WEIGHT_NAME, PEFT_NAME)
        for p in folder.glob(f"{deep}/{n}")
    ]
    return sorted(p.relative_to(folder).as_posix() for p in paths)


def _choose(
    names: Iterable[str], *, where: str, source: str, find_below: Callable[[], list[str]] = list
) -> str:
    """Return the LoRA among file names: by diffusers' name, by PEFT's, the only one, or the only one below."""
    every = sorted(n for n in names if not PurePosixPath(n).name.startswith("."))
    files = [n for n in every if n.lower().endswith(SUFFIX)]
    for name in (WEIGHT_NAME, PEFT_NAME):
        if name in files:
            return name
    if len(files) == 1:
        return files[0]
    if files:
        raise UsageError(
            f"lora: {where} has {len(files)} {SUFFIX} files ({', '.join(files[:5])}). Name one of them: "
            f"{source}:{files[0]}"
        )
    below = find_below()
    if len(below) == 1:
        return below[0]
    if below:
        raise UsageError(
            f"lora: {where} has no {SUFFIX} file itself, and {len(below)} LoRAs are below it "
            f"({', '.join(below[:5])}). Name one of them: {source}:{below[0]}"
        )
    others = f"; it has {', '.join(every[:5])}" if every else ""
    raise UsageError(f"lora: {where} has no {SUFFIX} file{others}")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, error=UsageError)
    if not isinstance(config, dict):
        raise UsageError(f"lora: {path} holds no PEFT configuration")
    return config


def _remote(repository: str, name: str) -> Source:
    """Download a file of a hub repository, its only LoRA where no name is given."""
    try:
        return _download(repository, name)
    except UsageError:
        raise
    # no such file, a full disk, a broken connection: the client's errors have no class in common
    except Exception as error:
        line = explain(error, repository)
        if line is None:
            reason = one_line(error, limit=_LONGEST)
            line = f"{repository} is no path that exists, and the hub did not give {name or 'its files'}: {reason}"
        raise UsageError(f"lora: {line}") from error


def _download(repository: str, name: str) -> Source:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    names: list[str] = []
    if not name:
        if constants.HF_HUB_OFFLINE:
            return _local(Path(snapshot_download(repository, local_files_only=True)), repository)
        names = HfApi().list_repo_files(repository)
        name = _choose(
            [n for n in names if "/" not in n] or names, where=repository, source=repository
        )
    path = Path(hf_hub_download(repository, name))
    config = str(PurePosixPath(name).with_name(CONFIG_NAME))
    if path.name == PEFT_NAME or config in names:
        hf_hub_download(repository, config)
    return _local(path, repository)
