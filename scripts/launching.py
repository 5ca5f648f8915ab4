"""Command lines of the scripts that `accelerate launch` starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def arguments(argv: Sequence[str], *, script: str, default: str | None = None) -> list[str]:
    """Return the arguments of `diffalign` for a launcher's arguments.

    The flag `--config NAME` becomes the recipe of the verb `train`; everything else is an override.

    Args:
        argv: arguments of the launcher.
        script: name of the launcher, for its error.
        default: recipe without `--config`; None requires it.
    """
    rest = list(argv)
    for i, item in enumerate(rest):
        key, separator, value = item.partition("=")
        if key == "--config":
            name = value if separator else (rest[i + 1] if i + 1 < len(rest) else "")
            del rest[i : i + (1 if separator else 2)]
            if name:
                return ["train", name, *rest]
            break
    else:
        if default is not None:
            return ["train", default, *rest]
    sys.exit(f"{script}: --config is missing. Name a recipe (`diffalign list recipes`) or a file.")
