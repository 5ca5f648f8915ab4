"""The parser of the command line: no abbreviations, ranges of numbers, hints for misspelt names."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any, NoReturn

from diffalign.core.errors import UserError
from diffalign.core.nearest import nearest

WIDTH = 100
"""Columns of the description in `--help`; examples below it keep their lines."""


class Misused(UserError):
    """A value that a flag does not take; the parser of the verb shows its usage."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors name the flag, the value and the nearest valid name."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        paragraphs = (options.get("description") or "").split("\n")
        options["description"] = "\n".join(textwrap.fill(text, WIDTH) for text in paragraphs)
        super().__init__(allow_abbrev=False, **options)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a value; an error of the flag's type gets the flag's name."""
        convert = self._registry_get("type", action.type, action.type)
        try:
            return convert(arg_string)
        except UserError as error:
            raise Misused(name_argument(flag_of(action), str(error))) from error
        except (TypeError, ValueError):
            return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError for a value that is no choice."""
        if action.choices is not None and value not in action.choices:
            hint = nearest(str(value), [str(c) for c in action.choices])
            kind = "verb" if isinstance(action, argparse._SubParsersAction) else "value"
            raise argparse.ArgumentError(
                None if kind == "verb" else action, f"unknown {kind} {value!r}{hint}"
            )

    def unknown(self, arguments: list[str]) -> NoReturn:
        """Exit with the usage and the nearest flag for arguments that the parser does not know."""
        name = next((a for a in arguments if a.startswith("-")), "").partition("=")[0]
        flags = [f for a in self._actions for f in a.option_strings if f.startswith("--")]
        hint = ""
        if name:
            bare = {f.removeprefix("--"): f for f in flags}
            told = nearest(name.lstrip("-").replace("-", "_"), bare)
            hint = re.sub(r"did you mean '(\w+)'", r"did you mean --\1", told)
            hint = hint if "did you mean" in hint else ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{hint}")

    def error(self, message: str) -> NoReturn:
        """Print the usage of the verb and one line, and exit."""
        self.print_usage(_stderr())
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


class SpellingParser(Parser):
    """A parser that knows the spelling of commands only: values are not checked, places need not exist."""

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except UserError:
            return arg_string


def flag_of(action: argparse.Action) -> str:
    """Return what a user types for an argument."""
    return action.option_strings[-1] if action.option_strings else str(action.dest)


def _stderr() -> Any:
    from diffalign.core.console import stderr

    return stderr()


def name_argument(flag: str, problem: str) -> str:
    """Return a problem with its flag in front."""
    return f"{flag} {problem}" if problem.startswith("must ") else f"{flag}: {problem}"
