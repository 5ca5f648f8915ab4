"""Places of models: distinction of names, paths and hub ids."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.core.errors import UserError, one_line
from diffalign.core.files import expand_home
from diffalign.core.nearest import closest

INDEX = "model_index.json"
HUB_ID = re.compile(r"(?P<source>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[^@\s]+))?")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


class UnknownModel(UserError, ValueError):
    """Model that does not exist, or whose family is not supported."""


@dataclass(frozen=True)
class Place:
    """Place of a model on this machine or the hub.

    Attributes:
        kind: "folder" in diffusers' layout, "file" (a single .safetensors), or "hub".
        source: path, or hub id.
        revision: branch, tag or commit of a hub id.
    """

    kind: str
    source: str
    revision: str | None = None


def look(name: str, *, setting: str = "model.name") -> Place | None:
    """Return the place of a path or a hub id, or None for other names.

    A path that exists is never a hub id.

    Raises:
        UnknownModel: the path does not exist or holds no model.
    """
    path = expand_home(name)
    if path.is_dir():
        return _folder(path, setting)
    if path.exists():
        return _file(path, setting)
    hub = HUB_ID.fullmatch(name)
    looks_like_a_path = (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.partition("@")[0].count("/") > 1
        or path.suffix.lower() in (*PICKLES, ".safetensors", ".gguf")
    )
    if hub and not looks_like_a_path:
        return Place("hub", hub["source"], hub["revision"])
    if looks_like_a_path:
        raise UnknownModel(f"{name} does not exist{_nearest(path)}", setting=setting)
    return None


def _nearest(path: Path) -> str:
    """Return a hint about a missing path: the most similar name beside it."""
    parent = path.parent
    if not parent.is_dir():
        return f"; neither does {parent}" if parent.name else ""
    names = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    close = closest(path.name, names, cutoff=0.6)
    return f"; did you mean {parent / close}?" if close else f"; {parent} has no such entry"


def _folder(path: Path, setting: str) -> Place:
    if (path / INDEX).is_file():
        return Place("folder", str(path))
    advice = "give a pipeline in diffusers' layout"
    inner = sorted(p.parent for p in (*path.glob(f"*/{INDEX}"), *path.glob(f"snapshots/*/{INDEX}")))
    single = sorted(p for p in path.glob("*.safetensors") if p.name not in LORA_FILES)
    if inner:
        advice = f"it holds a pipeline in {inner[-1]}: give that folder"
    elif any((path / name).is_file() for name in LORA_FILES):
        advice = f"it holds a LoRA: give its base model, and {path} as `lora`"
    elif (path / "lora").is_dir():
        advice = f"it is a training run: give the base model, and {path / 'lora'} as `lora`"
    elif (path / "config.json").is_file():
        advice = "it is one component of a pipeline: give the folder of the whole pipeline"
    elif len(single) == 1:
        advice = f"it holds the single file {single[0].name}: give {single[0]}"
    elif not any(path.iterdir()):
        advice = f"it is empty: {advice}"
    raise UnknownModel(f"{path} has no {INDEX}; {advice}", setting=setting)


def _file(path: Path, setting: str) -> Place:
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return Place("file", str(path))
    if path.name == INDEX:
        return Place("folder", str(path.parent))
    advice = "give a folder in diffusers' layout or a .safetensors file"
    if suffix in PICKLES:
        advice = (
            "it is a pickle, which can run code when it is read, and is refused: take the .safetensors file of that "
            "model, or convert it in a sandbox"
        )
    elif suffix == ".gguf":
        advice = "weights in GGUF are not supported: take the .safetensors file of that model"
    raise UnknownModel(f"{path} is no model; {advice}", setting=setting)


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a pipeline's `model_index.json`.

    Raises:
        UnknownModel: the file is damaged; the message names it.
    """
    file = Path(folder) / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error)
        raise UnknownModel(f"{file} could not be read: {reason}") from error
    return check_index(index, file)


def check_index(index: Any, where: object) -> dict[str, Any]:
    """Return the content of a `model_index.json`, or raise UnknownModel if it is invalid."""
    if not isinstance(index, dict):
        raise UnknownModel(f"{where} is damaged: an object was expected, not {_short(index)}")
    class_name(index, where)
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        names = all(e is None or isinstance(e, str) for e in entry)
        if len(entry) != 2 or not names:
            raise UnknownModel(
                f"{where} is damaged: {part} must be a library and a class, not {_short(entry)}"
            )
    return index


def class_name(index: Mapping[str, Any], where: object = INDEX) -> str:
    """Return the class name in a pipeline's `model_index.json`."""
    # a folder with its own code names a file and a class
    name = index.get("_class_name")
    if isinstance(name, list) and len(name) == 2:
        name = name[1]
    if not isinstance(name, str) or not name:
        raise UnknownModel(
            f"{where} is damaged: _class_name must name a pipeline class, not "
            f"{_short(index.get('_class_name'))}; download the file again"
        )
    return name


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."
