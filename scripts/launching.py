"""What the launchers of `accelerate launch` share."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def arguments(argv: Sequence[str], *, script: str, default: str | None = None) -> list[str]:
    """`--config NAME` becomes the recipe of the verb `train`; everything else is an override."""
    rest = list(argv)
    for i, item in enumerate(rest):
        key, given, value = item.partition("=")
        if key == "--config":
            name = value if given else (rest[i + 1] if i + 1 < len(rest) else "")
            del rest[i : i + (1 if given else 2)]
            if name:
                return ["train", name, *rest]
            break
    else:
        if default is not None:
            return ["train", default, *rest]
    sys.exit(f"{script}: --config NAME_OR_FILE is missing; see `diffalign list recipes`")
