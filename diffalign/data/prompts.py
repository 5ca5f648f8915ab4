"""Prompts from the Shapes language or from files, each with the metadata that rewards may need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.core.errors import UserError


class PromptError(UserError, ValueError):
    """A prompt file that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Prompt:
    """A text and its metadata (GenEval's `tag`, `include`, `exclude`, or anything else)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return str(self.metadata.get("tag", "all"))


def load_prompts(source: str, *, limit: int | None = None) -> list[Prompt]:
    """Prompts of `geneval` (its 553), `geneval:train` (others), `shapes:train`, `shapes:held_out`, a .txt file (one a
    line) or a .jsonl file (GenEval's format).

    `limit` keeps that many, spread evenly over the file.
    """
    if source.startswith("shapes:"):
        from diffalign.shapes.prompts import prompts

        try:
            found = [
                Prompt(entry["prompt"], entry) for entry in prompts(source.removeprefix("shapes:"))
            ]
        except ValueError as error:
            raise PromptError(f"prompts {source!r}: {error}") from error
    elif source in ("geneval", "geneval:train"):
        from diffalign.geneval import prompts as geneval_prompts

        published = source == "geneval"
        entries = geneval_prompts.prompts() if published else geneval_prompts.training_prompts()
        found = [Prompt(entry["prompt"], entry) for entry in entries]
    else:
        found = _read(Path(source))
    return found if limit is None else spread(found, limit)


def told(prompts: Sequence[Prompt]) -> list[list[Any]]:
    """Texts and metadata in their order: what digests are of."""
    return [[p.text, p.metadata] for p in prompts]


def spread(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """So many, spread evenly over the list; all where there are no more."""
    if limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def _read(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise PromptError(
            f"prompt file {path} does not exist; expected shapes:train, geneval:train, a .txt or a .jsonl file"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise PromptError(f"prompt file {path} is not UTF-8 text: {error}") from error
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptError(f"prompt file {path} must end in .txt or .jsonl")
    parse = _parse_json if path.suffix == ".jsonl" else _plain
    found = [parse(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise PromptError(f"prompt file {path} holds no prompt")
    return found


def _plain(line: str, place: str) -> Prompt:
    return Prompt(line.strip(), {"prompt": line.strip()})


def parse_line(line: str, place: str, *, error: type[UserError] = PromptError) -> Any:
    """A line of a .jsonl file; `error` with its place where it is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as cause:
        raise error(f"{place} is not valid JSON: {cause}") from cause


def _parse_json(line: str, place: str) -> Prompt:
    entry = parse_line(line, place)
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("prompt"), str)
        or not entry["prompt"].strip()
    ):
        raise PromptError(f'{place} needs a "prompt" with a text')
    return Prompt(entry["prompt"], entry)
