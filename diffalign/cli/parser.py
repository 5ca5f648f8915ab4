"""Parser of the command line, with hints for misspelt names and no abbreviations."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, NoReturn

from diffalign.core.errors import UserError
from diffalign.core.nearest import closest, nearest

WIDTH = 100
"""Width in columns of the description in `--help`; examples below it are not wrapped."""


class Misused(UserError):
    """Value that a flag does not accept; the verb's parser then shows its usage."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors name the flag, the value and the nearest valid name."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        paragraphs = (options.get("description") or "").split("\n")
        options["description"] = "\n".join(textwrap.fill(text, WIDTH) for text in paragraphs)
        super().__init__(allow_abbrev=False, **options)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a value, and put the flag's name in front of errors."""
        convert = self._registry_get("type", action.type, action.type)
        try:
            return convert(arg_string)
        except UserError as error:
            raise Misused(name_argument(flag_of(action), str(error))) from error
        except (TypeError, ValueError):
            return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError for a value that is not among the choices."""
        if action.choices is not None and value not in action.choices:
            hint = nearest(str(value), [str(c) for c in action.choices])
            kind = "verb" if isinstance(action, argparse._SubParsersAction) else "value"
            raise argparse.ArgumentError(
                None if kind == "verb" else action, f"unknown {kind} {value!r}{hint}"
            )

    def unknown(self, arguments: list[str]) -> NoReturn:
        """Exit with the usage and the nearest flag for unknown arguments."""
        name = next((a for a in arguments if a.startswith("-")), "").partition("=")[0]
        flags = [f for a in self._actions for f in a.option_strings if f.startswith("--")]
        names = (f.removeprefix("--") for f in flags)
        close = closest(name.lstrip("-").replace("-", "_"), names) if name else None
        hint = f"; did you mean --{close}?" if close else ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{hint}")

    def error(self, message: str) -> NoReturn:
        """Print the usage of the verb and one line, and exit."""
        self.print_usage(_stderr())
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


def flag_of(action: argparse.Action) -> str:
    """Return an argument as a user types it: its flag, or its name if it has none."""
    return action.option_strings[-1] if action.option_strings else str(action.dest)


def _stderr() -> Any:
    from diffalign.core.console import stderr

    return stderr()


def name_argument(flag: str, problem: str) -> str:
    """Return a message with the flag in front."""
    return f"{flag} {problem}" if problem.startswith("must ") else f"{flag}: {problem}"
