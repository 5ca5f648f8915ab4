"""Record that describes a verb of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser


@dataclass(frozen=True)
class Verb:
    """Verb of the command line.

    The module of a verb does not import torch; its `run` imports what it needs.

    Attributes:
        flags: dataclass of the values that `run` takes.
        shares: several processes may share the work.
        resumes: the same command continues an interrupted one.
        takes_settings: unknown flags are settings of a recipe (`flags.settings`).
        has_result: the verb has a result for programs, which `--json` prints.
        quiet: messages of other libraries are shown with `--verbose` only.
    """

    name: str
    help: str
    add_flags: Callable[[Parser], None]
    run: Callable[[Any], None]
    flags: type[Values] = Values
    description: str | None = None
    epilog: str | None = None
    shares: bool = False
    resumes: bool = False
    takes_settings: bool = False
    has_result: bool = True
    quiet: bool = True
    verbs: tuple[Verb, ...] = ()
    """Verbs below this one; the first is the default."""
