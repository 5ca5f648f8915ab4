"""diffalign: align diffusion models, make them fast, and prove both."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_ACCELERATION = ("accelerate", "accelerated", "acceleration", "restore")
"""Names of `diffalign.acceleration` that this package offers, imported on use."""


def load(source: str, **kwargs: Any) -> Any:
    """Load a diffusers pipeline, with packed weights and Q-Sched's factors if it has them.

    A folder with an `acceleration.json` is accelerated as this plan says.

    Args:
        source: a name of `diffalign list models`, a folder, a single file or a hub id.
        kwargs: arguments of `DiffusionPipeline.from_pretrained`; `torch_dtype` defaults to float32.
    """
    from pathlib import Path

    from diffalign.pipelines.registry import load_pipeline

    pipeline = load_pipeline(source, **kwargs)
    plan = Path(source).expanduser() / "acceleration.json"
    if plan.is_file():
        from diffalign.acceleration.apply import accelerate

        accelerate(pipeline, plan)
    return pipeline


def __getattr__(name: str) -> Any:
    if name not in _ACCELERATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # the package `acceleration` can be called
    package = import_module("diffalign.acceleration")
    return package if name == "acceleration" else getattr(package, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ACCELERATION])
