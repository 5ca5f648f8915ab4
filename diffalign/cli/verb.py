"""The record that a verb of the command line is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from diffalign.cli.parser import Parser


@dataclass(frozen=True)
class Verb:
    """One verb. `add_flags` and its module stay free of torch; `run` imports what it needs.

    shares: several processes may share its work.
    resumes: the same command continues an interrupted one.
    takes_settings: flags that the parser does not know are settings of a recipe (`args.settings`).
    has_result: it has a result for programs, which `--json` prints.
    quiet: other libraries' messages are shown with `--verbose` only.
    """

    name: str
    help: str
    add_flags: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], None]
    description: str | None = None
    epilog: str | None = None
    shares: bool = False
    resumes: bool = False
    takes_settings: bool = False
    has_result: bool = True
    quiet: bool = True
    verbs: tuple[Verb, ...] = ()
    """Verbs below this one; the first is meant where none is named."""
