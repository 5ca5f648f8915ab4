"""Python and shell snippets of README and docs."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.cli.parser import Parser
from diffalign.core.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^( *)```([a-z]*)\n(.*?)^\1```$", re.M | re.S)


class SpellingParser(Parser):
    """Parser that checks the spelling of commands, but no values.

    Paths in the commands need not exist.
    """

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except UserError:
            return arg_string


@dataclass(frozen=True)
class Snippet:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Return page and line, the test's name."""
        return f"{self.page}:{self.line}"


def snippets(*languages: str) -> list[Snippet]:
    """Return all blocks in these languages; "" is a block without one."""
    blocks = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            indent, language, body = match.groups()
            if language in languages:
                line = text.count("\n", 0, match.start()) + 1
                body = re.sub(rf"^{indent}", "", body, flags=re.M)
                name = page.relative_to(ROOT).as_posix()
                blocks.append(Snippet(name, line, language, body))
    return blocks


def commands() -> list[tuple[Snippet, list[str]]]:
    """Return the words of every `diffalign` command in blocks of shell."""
    lines = []
    for snippet in snippets("", "bash", "sh", "console"):
        for line in snippet.text.replace("\\\n", " ").splitlines():
            if line.startswith(("diffalign ", "accelerate launch ")):
                words = shlex.split(line, comments=True)
                lines.append((snippet, words[1:] if words[0] == "diffalign" else words))
    return lines
