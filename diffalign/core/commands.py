"""Commands of this program as text, for pages and messages."""

from __future__ import annotations

import shlex


def command(verb: str, *values: object, **arguments: object) -> str:
    """Return the command of a verb as a shell takes it.

    Args:
        values: what the verb takes without a name, for example a prompt.
        arguments: named arguments, in order. An argument that is None is left out.
    """
    words = ["diffalign", verb, *map(str, values)]
    for name, value in arguments.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)
