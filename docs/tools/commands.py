"""Write the reference of all commands from their parsers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from unittest import mock

from diffalign.cli.main import build_parser

INTRODUCTION = """# Commands

This page is made from the code: it shows what `diffalign VERB --help` prints. Verbs that train also take every
[setting](settings.md) as `--group.key=value`.
"""


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers of all verbs, each followed by its own verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield child
                yield from parsers(child)


def page() -> str:
    """Return the whole reference in Markdown."""
    parts = [INTRODUCTION]
    # argparse wraps its texts to the width of the terminal
    with mock.patch.dict(os.environ, {"COLUMNS": "90"}):
        for parser in parsers(build_parser()):
            text = parser.format_help().rstrip()
            parts.append(f"## `{parser.prog}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
