"""Pipeline folders with variants of weights or without optional components."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.pipelines.places import UnknownModel

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[A-Za-z_]\w*))?(?P<shard>-\d+-of-\d+)?"
    r"(?:\.(?P<legacy>[A-Za-z_]\w*))?\.(?P<suffix>safetensors|bin)"
)
PREFERRED = ("fp16", "bf16")
"""Variants of weights in the order of preference."""
WEIGHTLESS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")
CAN_BE_MISSING = ("text_encoder_3", "tokenizer_3")
"""Components that a stock pipeline can run without, although its class requires them."""


def files_of(folder: str | Path) -> tuple[str, ...]:
    """Return the paths of a folder's files in its subfolders, relative to it."""
    root = Path(folder)
    return tuple(p.relative_to(root).as_posix() for p in root.glob("*/*") if p.is_file())


def options(
    index: Mapping[str, Any], files: Iterable[str], *, where: str, passed: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that a folder needs.

    They are `variant`, and None for each optional component that is missing.

    Args:
        index: content of `model_index.json`.
        files: paths in the folder.
        where: name of the folder in messages.
        passed: components that the caller passes, which need no files.

    Raises:
        UnknownModel: a required component is missing.
    """
    by_part: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        if len(path.parts) == 2:
            by_part.setdefault(path.parts[0], []).append(path.name)
    optional = (*_optional(index), *CAN_BE_MISSING)
    arguments: dict[str, Any] = {}
    holders: dict[str, list[str]] = {}
    for part, entry in index.items():
        if part.startswith("_") or part in passed or not isinstance(entry, list):
            continue
        if entry[0] is None or (part not in by_part and part in optional):
            arguments[part] = None
        elif part not in by_part:
            raise UnknownModel(
                f"{where} has no folder {part}, which its model_index.json names: the download is not complete"
            )
        elif not str(entry[1]).endswith(WEIGHTLESS) and "Tokenizer" not in str(entry[1]):
            holders[part] = by_part[part]
    if "safety_checker" in arguments and "requires_safety_checker" in index:
        arguments["requires_safety_checker"] = False
    variant = _variant(holders, where)
    return arguments | ({"variant": variant} if variant else {})


def _optional(index: Mapping[str, Any]) -> tuple[str, ...]:
    import diffusers

    name = index["_class_name"]
    kind = getattr(diffusers, name if isinstance(name, str) else name[1], None)
    return tuple(getattr(kind, "_optional_components", ()))


def _variant(holders: Mapping[str, list[str]], where: str) -> str | None:
    """Return the variant that all components' weights have, or None for plain weights."""
    choices: set[str] | None = None
    for part, names in holders.items():
        matches = [m for m in map(WEIGHTS.fullmatch, names) if m]
        variants = {m["variant"] or m["legacy"] for m in matches}
        _check_shards(part, names, matches, where)
        if not variants or None in variants:
            continue
        named = {v for v in variants if v}
        choices = named if choices is None else choices & named
        if not choices:
            raise UnknownModel(
                f"{where}: its components have weights of different variants and none in common; {part} has "
                f"{', '.join(sorted(named))}"
            )
    if not choices:
        return None
    return next((v for v in PREFERRED if v in choices), min(choices))


def _check_shards(part: str, names: list[str], matches: list[re.Match[str]], where: str) -> None:
    """Raise UnknownModel if weights in several files have no index of their tensors."""
    shards = [m for m in matches if m["shard"]]
    whole = [m for m in matches if not m["shard"]]
    if shards and not whole and not any(n.endswith(".json") and ".index." in n for n in names):
        first = shards[0]
        index = f"{first['stem']}.{first['suffix']}.index.json"
        raise UnknownModel(
            f"{where}/{part} has weights in {len(shards)} files and no {index}, which says what lies where: download "
            "that file, too"
        )
