"""Drop-in acceleration of a diffusers pipeline: options, rules, undo and report.

Names are imported on use, so that the import of this package loads no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Cache": "cache",
    "Call": "drawing",
    "Schedule": "schedule",
    "Tap": "tap",
    "calibrate": "calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
