"""Prompts with metadata for rewards: the Shapes language, GenEval or files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.core.errors import UserError
from diffalign.core.text import parse_json, read_lines, suffix_of, unusable

SUFFIXES = (".txt", ".jsonl")
"""Suffixes of prompt files."""
GENEVAL = ("geneval", "geneval:train")
"""Names of GenEval's sets of prompts."""


class PromptError(UserError, ValueError):
    """Prompt file that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Prompt:
    """Text of a prompt and its metadata, such as GenEval's `tag`, `include` and `exclude`."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return str(self.metadata.get("tag", "all"))


def load_prompts(source: str, *, limit: int | None = None) -> list[Prompt]:
    """Load a named set of prompts, or a file of prompts.

    Args:
        source: `geneval` (its 553 prompts), `geneval:train` (other prompts), `shapes:train`, `shapes:held_out`, a .txt
            file (one prompt per line) or a .jsonl file (GenEval's format).
        limit: number of prompts to keep, spread evenly over the set.

    Raises:
        PromptError: the file cannot be used; the message names file and line.
    """
    if source.startswith("shapes:"):
        from diffalign.shapes.prompts import prompts

        try:
            items = [
                Prompt(entry["prompt"], entry) for entry in prompts(source.removeprefix("shapes:"))
            ]
        except ValueError as error:
            raise PromptError(f"prompts {source!r}: {error}") from error
    elif source in GENEVAL:
        from diffalign.geneval import prompts as geneval_prompts

        published = source == "geneval"
        entries = geneval_prompts.prompts() if published else geneval_prompts.training_prompts()
        items = [Prompt(entry["prompt"], entry) for entry in entries]
    else:
        items = _read(Path(source))
    return spread(items, limit)


def is_file(source: str) -> bool:
    """Return True for a user's file, False for a set that ships with the suite."""
    return not source.startswith("shapes:") and source not in GENEVAL


def told(prompts: Sequence[Prompt]) -> list[list[Any]]:
    """Return texts and metadata in order, as the input of a digest."""
    return [[p.text, p.metadata] for p in prompts]


def spread(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """Return `limit` prompts, spread evenly over the list.

    Return all prompts for None, or if there are fewer.
    """
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def read_arguments(arguments: Sequence[str]) -> list[Prompt]:
    """Return the prompts of arguments, which are texts, or prompt files by their suffix.

    Raises:
        PromptError: a file cannot be used, or no tokenizer accepts a text.
    """
    items: list[Prompt] = []
    for text in arguments:
        if not text.strip():
            raise PromptError(
                f"prompt {text!r} is empty; give a text, or a .txt or .jsonl file of prompts"
            )
        if suffix_of(text) in SUFFIXES or (suffix_of(text) and os.path.isfile(text)):
            items += load_prompts(text)
        else:
            items.append(Prompt(_checked(text, f"prompt {text!r}")))
    return items


def _read(path: Path) -> list[Prompt]:
    if not path.is_file():
        why = "that is a folder" if path.is_dir() else f"there is no {path.absolute()}"
        raise PromptError(
            f"prompt file {path} does not exist: {why}; expected geneval, geneval:train, "
            "shapes:train, shapes:held_out, a .txt or a .jsonl file"
        )
    if suffix_of(path) not in SUFFIXES:
        raise PromptError(
            f"prompt file {path} must end in .txt or .jsonl: one prompt per line, or one object with a prompt"
        )
    parse = _parse_json if suffix_of(path) == ".jsonl" else _plain
    lines = read_lines(path, error=PromptError)
    items = [parse(line, f"{path}:{i}") for i, line in lines if line.strip()]
    if not items:
        raise PromptError(f"prompt file {path} holds no prompt. Write one in each line")
    return items


def _checked(text: str, place: str) -> str:
    if why := unusable(text):
        raise PromptError(f"{place} is not usable: {why}")
    return text


def _plain(line: str, place: str) -> Prompt:
    text = _checked(line.strip(), place)
    return Prompt(text, {"prompt": text})


def _parse_json(line: str, place: str) -> Prompt:
    entry = parse_json(line, place, error=PromptError)
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("prompt"), str)
        or not entry["prompt"].strip()
    ):
        raise PromptError(f'{place} needs a "prompt" with a text. Correct that line')
    return Prompt(_checked(entry["prompt"], place), entry)
