"""Drop-in acceleration of a diffusers pipeline: options, rules, undo and report.

Names are imported on use, so that the import of this package loads no torch. The package can be called:
`diffalign.acceleration(pipeline)` returns the report of a pipeline.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOMES = {
    "Acceleration": "report",
    "Plan": "report",
    "accelerate": "apply",
    "accelerated": "apply",
    "restore": "apply",
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


class _Package(ModuleType):
    """Package whose call is `apply.report_of`."""

    def __call__(self, pipeline: Any) -> Any:
        return import_module(f"{__name__}.apply").report_of(pipeline)


sys.modules[__name__].__class__ = _Package
