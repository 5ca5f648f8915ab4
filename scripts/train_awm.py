"""Launcher for several processes: `accelerate launch scripts/train_awm.py --config RECIPE [--key=value ...]`."""

from __future__ import annotations

import sys

from diffalign.cli import main


def arguments(argv: list[str]) -> list[str]:
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
    sys.exit("train_awm: --config NAME_OR_FILE is missing; see `diffalign list recipes`")


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
