"""Versions of the software that a result was measured with."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *("diffalign", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy"),
    "torchmetrics",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and the main packages, and the commit of a checkout."""
    commit = _commit()
    return dict(_installed()) | ({"commit": commit} if commit else {})


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    """Return names and versions, which are read once.

    Reading them takes as long as an image of a small model.
    """
    installed = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            installed.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(installed)


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # a checkout on a machine without git
        return None
    return done.stdout.strip() or None
